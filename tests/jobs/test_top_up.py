"""`jobs.top_up`: scheduled runs append parts, do not overlap, and together make the whole table."""

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from in_process import in_process
from set_options import set_options

from jobs import encode_latents, generate_pairs, render_scenes, top_up
from pipelines.ray_data.execution import PipelineStage
from pipelines.tables.leases import append_lease
from pipelines.tables.table import open_table

SETTINGS = (
    *("source.scenes=40", "source.scenes_per_shard=20", "latents.rows_per_unit=10"),
    *("pairs.rows_per_unit=8", "pairs.generation.steps=2", "pairs.device.threads=1"),
)


def topped_up(out: Path, step: str, *assignments: str) -> int:
    return top_up.main([step, "--out", str(out), *set_options([*SETTINGS, *assignments])])


def rows_in(table: Path) -> int:
    return open_table(str(table)).num_rows


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    for job in (encode_latents, generate_pairs):
        monkeypatch.setattr(job, "runner", lambda *_, **__: in_process)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    assert render_scenes.main(["--out", str(tmp_path), *set_options(SETTINGS)]) == 0
    return tmp_path


def test_nightly_runs_append_until_nothing_is_left(out: Path, capsys):
    for rows in (20, 40, 40):
        assert topped_up(out, "encode_latents", "quota.rows=20") == 0
        assert rows_in(out / "latents") == rows
    for rows in (16, 32, 40, 40):
        assert topped_up(out, "generate_pairs", "quota.rows=9") == 0
        assert rows_in(out / "pairs") == rows
    assert "  0 rows more" in capsys.readouterr().out
    # Another draw is more work of the same kind.
    assert topped_up(out, "generate_pairs", "pairs.draws=2", "quota.rows=8") == 0
    assert rows_in(out / "pairs") == 48


def test_parts_have_the_bytes_of_one_run(out: Path):
    for _ in range(4):
        assert topped_up(out, "encode_latents", "quota.rows=1") == 0
    parts = {path.name: path.read_bytes() for path in (out / "latents").glob("*.parquet")}
    assert topped_up(out, "encode_latents", "source.table=whole") == 0
    assert parts == {path.name: path.read_bytes() for path in (out / "whole").glob("*.parquet")}


def test_an_overlapping_run_does_nothing(out: Path, capsys):
    with append_lease(str(out / "latents"), purpose="last night's"):
        assert topped_up(out, "encode_latents") == 0
    assert not (out / "latents").exists()
    assert "last night's on" in capsys.readouterr().out
    assert topped_up(out, "encode_latents") == 0
    assert rows_in(out / "latents") == 40


def test_time_and_budget_end_a_run(out: Path, monkeypatch: pytest.MonkeyPatch):
    def slowly(items: Iterable[Any], stages: list[PipelineStage]) -> Iterator[Any]:
        for result in in_process(items, stages):
            time.sleep(0.2)
            yield result

    monkeypatch.setattr(encode_latents, "runner", lambda *_, **__: slowly)
    assert topped_up(out, "encode_latents", "quota.minutes=0.005") == 0
    assert 10 <= rows_in(out / "latents") < 40
    before = rows_in(out / "latents")
    # A hundredth of a cent, at 1 an hour, is 0.36 s.
    assert topped_up(out, "encode_latents", "quota.budget=0.0001", "quota.price_per_hour=1.0") == 0
    assert before < rows_in(out / "latents")
    assert topped_up(out, "encode_latents") == 0
    assert rows_in(out / "latents") == 40
    assert sum(one.rows_read for one in open_table(str(out / "latents")).manifests().values()) == 40


@pytest.mark.parametrize(
    ("step", "assignment", "message"),
    [
        ("finetune_vpred", "quota.rows=1", "STEP finetune_vpred: encode_latents, generate_pairs"),
        ("encode_latents", "quota.budget=5.0", "price_per_hour"),
        ("encode_latents", "quota.rows=0", "quota.rows"),
    ],
)
def test_errors_are_one_line(tmp_path: Path, capsys, step: str, assignment: str, message: str):
    assert top_up.main([step, "--out", str(tmp_path), "--set", assignment]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_the_preview_has_the_quota(out: Path, capsys):
    options = set_options([*SETTINGS, "quota.rows=7"])
    assert top_up.main(["encode_latents", "--dry-run", "--out", str(out), *options]) == 0
    assert "in this run at most 7 rows" in capsys.readouterr().out
