"""Cleaning up: what nobody reads goes; what somebody reads, or may commit, stays."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import synthetic_units
from synthetic_units import without_first_row

from jobs import vacuum
from pipelines.tables.commits import replace_units
from pipelines.tables.leases import active_readers, read_lease
from pipelines.tables.table import open_table


def age(folder: Path) -> None:
    """Make every file look two hours old."""
    then = time.time() - 7200
    for path in folder.rglob("*"):
        if path.is_file():
            os.utime(path, (then, then))


def data_files(run: Path) -> set[str]:
    return {path.name for path in (run / "latents").iterdir() if path.is_file()}


def cleaned(run: Path, *options: str) -> int:
    return vacuum.main(["--out", str(run), "--set", "vacuum.hours=1.0", *options])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with a table of which a file was replaced, and one is torn."""
    url = str(tmp_path / "latents")
    synthetic_units.run(url)
    assert replace_units(url, [without_first_row(open_table(url).units[0])])
    (tmp_path / "latents" / ".s-000099.parquet.abc").write_bytes(b"half a file")
    age(tmp_path)
    return tmp_path


def test_nothing_goes_unless_it_is_asked_and_then_what_nobody_reads(run: Path, capsys):
    before, rows = data_files(run), open_table(str(run / "latents")).read()
    assert cleaned(run) == 0
    said = capsys.readouterr().out
    assert "4 files to delete" in said
    assert "(1 replaced, 2 sibling, 1 torn)" in said
    assert "nothing was deleted; --delete does it" in said
    assert data_files(run) == before
    assert cleaned(run, "--delete") == 0
    assert before - data_files(run) == {"s-000000-000004.parquet", ".s-000099.parquet.abc"}
    assert open_table(str(run / "latents")).read().equals(rows)
    capsys.readouterr()
    assert cleaned(run) == 0
    assert "latents, version" in (said := capsys.readouterr().out)
    assert "nothing to delete" in said


def test_a_version_that_a_lease_is_held_on_stays_whole(run: Path, capsys):
    table = open_table(str(run / "latents"))
    older = open_table(table.url, version=table.version - 1)
    rows = older.read()
    with read_lease(table.url, version=older.version, purpose="the training far away"):
        assert cleaned(run, "--delete") == 0
        assert f"version {older.version} is kept for the training far away" in capsys.readouterr().out
        assert open_table(table.url, version=older.version).read().equals(rows)
    assert active_readers(table.url) == []
    assert cleaned(run, "--delete") == 0
    assert "s-000000-000004.parquet" not in data_files(run)


def test_a_training_that_was_killed_finds_its_version(run: Path, capsys):
    table = open_table(str(run / "latents"))
    older = open_table(table.url, version=table.version - 1)
    begun = {"identity": {"latents": {"identity": older.lineage()["identity"], "version": older.version}}}
    (run / "student.training").mkdir()
    (run / "student.training" / "begun.json").write_text(json.dumps(begun))
    assert cleaned(run, "--delete") == 0
    assert "kept for the training student, which has not ended" in capsys.readouterr().out
    assert "s-000000-000004.parquet" in data_files(run)
    # What has ended reads no more.
    (run / "student").mkdir()
    (run / "student" / "metrics.json").write_text(json.dumps(begun))
    assert cleaned(run, "--delete") == 0
    assert "s-000000-000004.parquet" not in data_files(run)


def test_what_may_still_be_committed_stays(run: Path):
    # Young files, and whole files of units that a killed job did not come to commit.
    fresh = run / "latents" / ".s-000200.parquet.def"
    fresh.write_bytes(b"being written")
    waiting = run / "latents" / "s-000022-000026.parquet"
    waiting.write_bytes((run / "latents" / "s-000004-000008.parquet").read_bytes())
    os.utime(waiting, (time.time() - 7200,) * 2)
    assert cleaned(run, "--delete") == 0
    assert {fresh.name, waiting.name} <= data_files(run)


def test_what_a_version_that_cannot_be_opened_needs_is_not_guessed(run: Path, capsys):
    before, table = data_files(run), open_table(str(run / "latents"))
    with read_lease(table.url, version=table.version + 5, purpose="a training"):
        assert cleaned(run, "--delete") != 0
    assert "no table that can be opened" in capsys.readouterr().err
    assert data_files(run) == before
