"""What a commit names is on the disk before it, and its log entry right after it."""

import errno
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import synthetic_units
from deltalake import DeltaTable
from synthetic_units import IDENTITY, SCHEMA, finished

from jobs import render_scenes
from pipelines.stages.write import WriteUnit
from pipelines.tables.commits import commit_units
from pipelines.tables.table import create_table, open_table

UNIT = "s-000000-000004.parquet"
COMMITTED_UNIT = [
    *("sync file of latents", f"link latents/{UNIT}", "sync latents"),
    *("sync file of latents.rejects", "link latents.rejects/part", "sync latents.rejects"),
    *("commit latents.rejects", "sync entry 1 of latents.rejects", "sync log of latents.rejects"),
    *("commit latents", "sync entry 1 of latents", "sync log of latents"),
    *("sync file of latents.units", "link latents.units/part", "sync latents.units"),
    *("commit latents.units", "sync entry 1 of latents.units", "sync log of latents.units"),
]
"""The calls for one unit that rejects a row."""


def sync_call(path: str) -> str:
    """A short name for the sync of a path."""
    *_, folder, name = path.split("/")
    if found := re.fullmatch(r"(\d{20})\.json", name):
        return f"sync entry {int(found[1])} of {path.split('/')[-3]}"
    if name == "_delta_log":
        return f"sync log of {folder}"
    return f"sync file of {folder}" if name.startswith(".") else f"sync {name}"


def link_call(path: str) -> str:
    """A short name for the link of a path, which for a log entry is the commit."""
    *_, folder, name = path.split("/")
    if folder == "_delta_log":
        return f"commit {path.split('/')[-3]}"
    return f"link {folder}/{name.partition('-')[0] if name.startswith('part') else name}"


def test_data_is_synced_before_the_commit(tmp_path, monkeypatch):
    url = create_table(str(tmp_path / "latents"), schema=SCHEMA, identity=IDENTITY).url
    calls: list[str] = []
    fsync, link, commit = os.fsync, os.link, DeltaTable.create_write_transaction

    def recorded_fsync(descriptor: int) -> None:
        calls.append(sync_call(str(Path(f"/proc/self/fd/{descriptor}").readlink())))
        fsync(descriptor)

    def recorded_link(source: Path, target: Path) -> None:
        calls.append(link_call(str(target)))
        link(source, target)

    def recorded_commit(delta: DeltaTable, *arguments: object, **options: object) -> None:
        calls.append(f"commit {delta.table_uri.rstrip('/').rpartition('/')[2]}")
        commit(delta, *arguments, **options)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "link", recorded_link)
    monkeypatch.setattr(DeltaTable, "create_write_transaction", recorded_commit)
    commit_units(url, [WriteUnit(url=url, schema=SCHEMA, settings="s")(finished(0, 4))])
    assert calls == COMMITTED_UNIT


def test_entries_of_other_writers_are_synced_too(tmp_path, monkeypatch):
    url = create_table(str(tmp_path / "latents"), schema=SCHEMA, identity=IDENTITY).url
    writer = WriteUnit(url=url, schema=SCHEMA, settings="s")
    synced = []
    monkeypatch.setattr("pipelines.tables.transactions.sync", lambda path: synced.append(path.name))
    opened = DeltaTable(url)
    commit_units(url, [writer(finished(0, 4))])
    monkeypatch.setattr("pipelines.tables.open_log.open_delta", lambda _: opened)
    monkeypatch.setattr("pipelines.tables.commits._commit_rejects", lambda *_: None)
    monkeypatch.setattr("pipelines.tables.commits._commit_manifests", lambda *_: None)
    synced.clear()
    commit_units(url, [writer(finished(4, 8))])
    assert synced == [f"{1:020d}.json", f"{2:020d}.json", "_delta_log"]


def test_store_without_hard_links_is_refused_at_once(tmp_path, monkeypatch, capsys):
    def no_links(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "link", no_links)
    assert render_scenes.main(["--out", str(tmp_path / "run")]) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert "its file system has no hard links" in line
    assert [path.name for path in (tmp_path / "run").rglob("*") if path.is_file()] == []


strace = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")


def trace(folder: Path, *options: str, words: list[str]) -> tuple[subprocess.CompletedProcess[str], str]:
    """Run Python under strace; returns what it printed, and the trace of all its threads."""
    command = ["strace", "-f", "-y", "-o", str(folder / "trace"), *options, sys.executable, *words]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    return done, (folder / "trace").read_text()


@pytest.mark.slow
@strace
def test_system_calls_of_a_commit_come_in_order(tmp_path, capsys):
    url = str(tmp_path / "latents")
    create_table(url, schema=SCHEMA, identity=IDENTITY)
    run = f"import synthetic_units; synthetic_units.run({url!r}, total=4)"
    done, traced = trace(tmp_path, "-e", "trace=fsync,link,linkat", words=["-c", run])
    assert done.returncode == 0, done.stderr
    calls = []
    for line in traced.splitlines():
        if found := re.search(r"fsync\(\d+<(.*)>\)", line):
            calls.append(sync_call(found[1]))
        elif found := re.search(r'link(?:at)?\(.*"([^"]+)"(?:, 0)?\)', line):
            calls.append(link_call(found[1]))
    with capsys.disabled():
        print("", *calls, sep="\n  ")
    assert calls == COMMITTED_UNIT


@pytest.mark.slow
@strace
def test_system_without_links_refuses_a_job(tmp_path):
    out = tmp_path / "run"
    options = ("-e", "trace=link,linkat", "-e", "inject=link,linkat:error=EOPNOTSUPP")
    done, traced = trace(tmp_path, *options, words=["-m", "jobs.render_scenes", "--out", str(out)])
    assert "(INJECTED)" in traced
    assert done.returncode == 2
    assert "its file system has no hard links" in done.stderr.strip().splitlines()[-1]
    assert list(out.rglob("*.tar")) == list(out.rglob("_delta_log")) == []


def test_table_is_synced_when_it_is_created(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr("pipelines.tables.table.sync", synced.append)
    url = create_table(str(tmp_path / "latents"), schema=SCHEMA, identity=IDENTITY).url
    log = Path(url) / "_delta_log"
    assert synced[:4] == [log / f"{0:020d}.json", log, Path(url), tmp_path]
    assert len(synced) == 12
    synthetic_units.run(url)
    assert open_table(url).num_rows == 17
