"""`jobs.compact`: what it prints, where it writes, and mistakes in one line."""

import pytest
from in_process import in_process
from mistakes import assert_one_line, other_table

from jobs import compact, verify_table
from pipelines.tables.table import open_table


@pytest.fixture(autouse=True)
def without_ray(monkeypatch):
    """Workers are in this process; tests of the pools have Ray."""
    monkeypatch.setattr(compact, "runner", lambda *_, **__: in_process)


def test_a_dry_run_writes_nothing(run, capsys):
    before = sorted(run.out.rglob("*"))
    assert compact.main([str(run.out / "pairs"), "--dry-run"]) == 0
    assert "would write 18 rows of" in capsys.readouterr().out
    assert sorted(run.out.rglob("*")) == before


def test_a_compacted_table_is_verified(run, capsys):
    options = [str(run.out / "targets"), "--name", "targets-large"]
    assert compact.main([*options, "--set", "compaction.file_mib=0.03"]) == 0
    parent, table = run.table("targets"), open_table(str(run.out / "targets-large"))
    assert f"36 rows of {len(parent.units)} units in {len(table.units)} units" in capsys.readouterr().out
    assert verify_table.main([table.url, "--set", f"model={run.teacher}"]) == 0
    assert "2 units recomputed, 2 of them bit for bit" in capsys.readouterr().out


def test_mistakes_of_a_compaction_in_one_line(run, tmp_path, capsys):
    mistakes = {
        "--name '../else': the name of another table": ("pairs", "--name", "../else"),
        "--name 'pairs': the name of another table": ("pairs", "--name", "pairs"),
        "made with other settings": ("pairs", "--name", "latents"),
        "nothing holds no table": ("nothing",),
        "holds references; latents, pairs, targets can be compacted": (other_table(tmp_path),),
    }
    for message, (name, *options) in mistakes.items():
        assert compact.main([str(run.out / name), *options]) == 2
        assert_one_line(capsys, message)
