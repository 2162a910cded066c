"""`jobs.export_table`: what it prints, where it writes, and mistakes in one line."""

import shutil

import pytest
from deletion_run import Run, id_of
from in_process import in_process
from mistakes import assert_one_line, other_table

from jobs import export_table, forget
from pipelines.exports import webdataset

WEBDATASET = ("--to", "webdataset")


@pytest.fixture(autouse=True)
def without_ray(monkeypatch, keep_threads):
    """Workers are in this process; tests of the pools have Ray."""
    monkeypatch.setattr(export_table, "runner", lambda *_: in_process)


def exported(run: Run, name: str, *options: str) -> int:
    return export_table.main([str(run.out / name), "--set", f"model={run.teacher}", *options])


def test_an_export_beside_the_table_says_itself(run, capsys):
    assert exported(run, "pairs", *WEBDATASET, "--set", "export.rows_per_shard=5") == 0
    assert "export/pairs: 18 samples in 4 shards, 4 written now" in capsys.readouterr().out
    assert len([*(run.out / "export/pairs").glob("*.tar")]) == 4
    assert exported(run, "pairs", *WEBDATASET, "--set", "export.rows_per_shard=5") == 0
    assert "18 samples in 4 shards, 0 written now" in capsys.readouterr().out


def test_a_dry_run_writes_nothing(run, capsys):
    before = sorted(run.out.rglob("*"))
    assert exported(run, "pairs", *WEBDATASET, "--dry-run") == 0
    assert "would write 18 rows of" in capsys.readouterr().out
    assert sorted(run.out.rglob("*")) == before


def test_a_receipt_names_exports_of_deleted_rows(run, tmp_path, capsys):
    exported(run, "pairs", *WEBDATASET)
    (tmp_path / "ids.txt").write_text(f"{id_of(0, 1)}\n")
    assert forget.main(["--out", str(run.out), "--id", str(tmp_path / "ids.txt")]) == 0
    assert "exports of deleted rows, which are not changed: export/pairs" in capsys.readouterr().out
    shutil.rmtree(run.out / "export")
    assert exported(run, "pairs", *WEBDATASET) == 0
    capsys.readouterr()
    assert forget.main(["--out", str(run.out), "--id", str(tmp_path / "ids.txt")]) == 0
    assert "exports of" not in capsys.readouterr().out


def test_mistakes_of_an_export_in_one_line(whole_run, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    blocked = ("--folder", str(tmp_path / "file/export"))
    mistakes = {
        "'zarr' is not .*'webdataset'": ("pairs", "--to", "zarr"),
        "Missing option '--to'": ("pairs",),
        "file/export/export.json cannot be written": ("pairs", *WEBDATASET, *blocked),
        "nothing holds no table": ("nothing", *WEBDATASET),
        "holds references; latents, pairs, targets can be exported": (other_table(tmp_path), *WEBDATASET),
    }
    for message, arguments in mistakes.items():
        assert exported(whole_run, *arguments) == 2
        assert_one_line(capsys, message)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(webdataset.shutil, "disk_usage", lambda _: usage)
    assert exported(whole_run, "pairs", *WEBDATASET, "--folder", str(tmp_path / "export")) == 2
    assert_one_line(capsys, "needs about .* and its disk has")
