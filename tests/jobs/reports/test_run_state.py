"""Conditions under which a second run of the pipeline ends at once."""

import os
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from deltalake import write_deltalake
from reported_run import make_pairs

from jobs import run_pipeline
from jobs.cli.job import Job, resolve_recipe
from jobs.reports.run_state import input_state, is_done, mark_done


@pytest.fixture
def shards(tmp_path) -> Path:
    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / "0.tar").write_bytes(b"0")
    return folder


@pytest.fixture
def job(tmp_path, shards) -> Job:
    """A run with a table, a training and shards of its own, marked as done."""
    out = tmp_path / "run"
    write_deltalake(out / "latents", pa.table({"id": [1]}))
    (out / "student").mkdir()
    (out / "student" / "metrics.json").write_text("{}")
    recipe = resolve_recipe("mini", [f"source.url={shards}"])
    job = Job(verb="run_pipeline", recipe=recipe, out=str(out))
    assert not is_done(job)
    mark_done(job, input_state(job))
    assert is_done(job)
    return job


def with_settings(job: Job, *assignments: str) -> Job:
    return replace(job, recipe=job.recipe.with_values(assignments))


@pytest.mark.parametrize(
    "change",
    [
        lambda job, shards: (shards / "1.tar").write_bytes(b"1"),
        lambda job, shards: os.utime(shards / "0.tar", (1, 1)),
        lambda job, shards: write_deltalake(f"{job.out}/latents", pa.table({"id": [2]}), mode="append"),
        lambda job, shards: Path(job.out, "student", "metrics.json").unlink(),
        lambda job, shards: write_deltalake(f"{job.out}/forgotten", pa.table({"key": ["x"]})),
    ],
    ids=["a shard more", "a shard replaced", "rows more", "a training lost", "a deletion"],
)
def test_a_change_of_anything_is_noticed(job, shards, change):
    change(job, shards)
    assert not is_done(job)


def test_a_shard_that_comes_during_a_run_is_left_to_the_next(job, shards):
    before = input_state(job)
    (shards / "1.tar").write_bytes(b"1")
    mark_done(job, before)
    assert not is_done(job)


def test_other_settings_are_not_done(job):
    assert not is_done(with_settings(job, "pairs.draws=2"))


def test_a_report_changes_nothing(job):
    Path(job.out, "report").mkdir()
    Path(job.out, "report", "index.html").write_text("")
    Path(job.out, "metrics.json").write_text("{}")
    assert is_done(job)


def test_a_glob_of_shards_is_listed(job, shards):
    job = with_settings(job, f"source.url={shards}/*.tar")
    mark_done(job, input_state(job))
    assert is_done(job)
    (shards / "1.tar").write_bytes(b"1")
    assert not is_done(job)


@pytest.mark.parametrize(
    "setting", ["model=someone/a-model", "captions.url=https://example.org/captions.txt"]
)
def test_what_cannot_be_listed_is_never_done(job, setting):
    job = with_settings(job, setting)
    assert input_state(job) is None
    mark_done(job, input_state(job))
    assert not is_done(job)


def test_a_run_that_is_done_goes_on_to_its_report(tmp_path, capsys):
    make_pairs(tmp_path)
    job = Job(verb="run_pipeline", recipe=resolve_recipe("mini", ["oracle_floor=0"]), out=str(tmp_path))
    mark_done(job, input_state(job))
    run_pipeline.run_pipeline(job)
    printed = capsys.readouterr().out
    assert printed.startswith("[1-8/9] nothing is left to do: render_scenes, encode_latents, ")
    assert (tmp_path / "report" / "index.html").exists()
