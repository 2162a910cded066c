"""`jobs.vacuum`: deletes files that nobody reads, keeps those that are read or may be committed."""

import json
import os
import time
from pathlib import Path

import pytest
import synthetic_units
from in_process import in_process
from scene_latents import encode_scenes
from synthetic_units import without_first_row

from jobs import encode_latents, forget, render_scenes, vacuum
from pipelines.deletion import rewrite
from pipelines.tables.commits import replace_units
from pipelines.tables.leases import active_readers, active_writers, read_lease, write_lease
from pipelines.tables.table import open_table


def age(folder: Path) -> None:
    """Set the modification time of every file to two hours ago."""
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
    """A run with a table with one replaced and one torn file."""
    url = str(tmp_path / "latents")
    synthetic_units.run(url)
    assert replace_units(url, [without_first_row(open_table(url).units[0])])
    (tmp_path / "latents" / ".s-000099.parquet.abc").write_bytes(b"half a file")
    age(tmp_path)
    return tmp_path


def test_only_delete_removes_the_unread_files(run: Path, capsys):
    before, rows = data_files(run), open_table(str(run / "latents")).read()
    assert cleaned(run) == 0
    output = capsys.readouterr().out
    assert "4 files to delete" in output
    assert "(1 replaced, 2 sibling, 1 torn)" in output
    assert "nothing was deleted" in output
    assert data_files(run) == before
    assert cleaned(run, "--delete") == 0
    assert before - data_files(run) == {"s-000000-000004.parquet", ".s-000099.parquet.abc"}
    assert open_table(str(run / "latents")).read().equals(rows)
    capsys.readouterr()
    assert cleaned(run) == 0
    assert "nothing to delete" in capsys.readouterr().out


def test_a_leased_version_stays_whole(run: Path, capsys):
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


def test_a_table_that_is_written_is_left_alone(run: Path, capsys):
    before, url = data_files(run), str(run / "latents")
    with write_lease(url, purpose="the build far away"):
        assert cleaned(run, "--delete") == 0
        assert "kept while the build far away on " in capsys.readouterr().out
        assert data_files(run) == before
    assert active_writers(url) == []
    assert cleaned(run, "--delete") == 0
    assert data_files(run) != before


def test_a_vacuum_of_everything_during_a_build_loses_nothing(tmp_path: Path, monkeypatch):
    def run_and_vacuum(items, stages):
        for written in in_process(items, stages):
            half = tmp_path / "latents" / ".another.parquet.abc"
            half.write_bytes(b"half a file of another worker")
            assert vacuum.main(["--out", str(tmp_path), "--set", "vacuum.hours=0", "--delete"]) == 0
            assert half.exists()
            yield written

    monkeypatch.setattr(encode_latents, "runner", lambda *_, **__: run_and_vacuum)
    options = ["--out", str(tmp_path), "--set", "source.scenes=8", "--set", "source.scenes_per_shard=4"]
    assert render_scenes.main(options) == 0
    assert encode_latents.main(options) == 0
    assert len(open_table(str(tmp_path / "latents")).read()) == 8


def test_a_vacuum_of_everything_during_a_deletion_loses_nothing(tmp_path: Path, monkeypatch, capsys):
    url = encode_scenes(tmp_path, count=8)
    ids = open_table(url).read()["id"].to_pylist()
    replace = rewrite.replace_units

    def vacuum_and_replace(*words):
        assert vacuum.main(["--out", str(tmp_path), "--set", "vacuum.hours=0", "--delete"]) == 0
        return replace(*words)

    monkeypatch.setattr(rewrite, "replace_units", vacuum_and_replace)
    (tmp_path / "ids.txt").write_text(f"{ids[0]}\n")
    assert forget.main(["--out", str(tmp_path), "--id", str(tmp_path / "ids.txt")]) == 0
    assert "kept while a deletion on " in capsys.readouterr().out
    assert open_table(url).read()["id"].to_pylist() == ids[1:]


def test_the_version_of_a_killed_training_stays(run: Path, capsys):
    table = open_table(str(run / "latents"))
    older = open_table(table.url, version=table.version - 1)
    begun = {"identity": {"latents": {"identity": older.lineage()["identity"], "version": older.version}}}
    (run / "student.training").mkdir()
    (run / "student.training" / "begun.json").write_text(json.dumps(begun))
    assert cleaned(run, "--delete") == 0
    assert "kept for the training student, which has not finished" in capsys.readouterr().out
    assert "s-000000-000004.parquet" in data_files(run)
    # A finished training reads no more.
    (run / "student").mkdir()
    (run / "student" / "metrics.json").write_text(json.dumps(begun))
    assert cleaned(run, "--delete") == 0
    assert "s-000000-000004.parquet" not in data_files(run)


@pytest.mark.parametrize("record", ["", '{"identity": {"latents"', "[]", "{}"])
def test_a_damaged_record_of_a_training_keeps_everything(run: Path, capsys, record: str):
    before = data_files(run)
    (run / "student.training").mkdir()
    (run / "student.training" / "begun.json").write_text(record)
    assert cleaned(run, "--delete") == 2
    error = capsys.readouterr().err
    assert "student.training/begun.json is damaged" in error
    assert error.count("\n") == 1
    assert data_files(run) == before


def test_files_that_may_be_committed_stay(run: Path):
    # Young files, and whole files of units that a killed job had not yet committed.
    fresh = run / "latents" / ".s-000200.parquet.def"
    fresh.write_bytes(b"being written")
    waiting = run / "latents" / "s-000022-000026.parquet"
    waiting.write_bytes((run / "latents" / "s-000004-000008.parquet").read_bytes())
    os.utime(waiting, (time.time() - 7200,) * 2)
    assert cleaned(run, "--delete") == 0
    assert {fresh.name, waiting.name} <= data_files(run)


def test_unopenable_leased_version_is_an_error(run: Path, capsys):
    before, table = data_files(run), open_table(str(run / "latents"))
    with read_lease(table.url, version=table.version + 5, purpose="a training"):
        assert cleaned(run, "--delete") != 0
    assert "no table that can be opened" in capsys.readouterr().err
    assert data_files(run) == before
