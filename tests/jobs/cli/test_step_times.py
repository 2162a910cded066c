"""Records of a run's steps: time, and the driver's own time and memory."""

import json
import time
from pathlib import Path

import numpy as np
import pytest

from jobs.cli.job import Job
from jobs.cli.step_times import DONE, StepTime, read_step, read_steps, record_step
from jobs.evaluation.memory import ResidentMemory
from jobs.recipes.miniature import mini
from jobs.runtime.progress import show_progress
from pipelines.tables.committer import CommitProgress
from pipelines.tables.network_time import NetworkTime, UnitSpan


@pytest.fixture
def job(tmp_path) -> Job:
    return Job(verb="plan", recipe=mini(), out=str(tmp_path))


def test_time_after_the_last_row_is_recorded(job, capsys):
    with record_step(job, "encode_latents"):
        show_progress("encode_latents")(CommitProgress(rows=1, total=1))
        time.sleep(0.3)
    step = read_step(job, "encode_latents")
    assert 0.3 <= step.driver_seconds <= step.seconds
    capsys.readouterr()


def test_a_step_without_rows_has_no_such_time(job):
    with record_step(job, "compile_mobile"):
        pass
    step = read_step(job, "compile_mobile")
    assert (step.driver_seconds, step.network_busy) == (None, None)


def test_share_of_computing_is_that_of_all_tables_of_a_step(job, capsys):
    with record_step(job, "evaluate"):
        for worker, computing in (("a", 7), ("b", 5)):
            progress = show_progress("evaluate")
            progress(CommitProgress(network_time=network_time(worker, computing=computing)))
            assert progress.network_busy == computing / 10
    assert read_step(job, "evaluate").network_busy == (7 + 5) / 20
    capsys.readouterr()


def network_time(worker: str, *, computing: int) -> NetworkTime:
    """Of a worker whose two units lie ten seconds apart."""
    spans = (UnitSpan(worker, 0.0, 1.0), UnitSpan(worker, 11.0 - computing, 10.0))
    return NetworkTime().with_span(spans[0]).with_span(spans[1])


def test_peak_memory_is_that_of_the_step(job):
    before = ResidentMemory().now_mb() * 1e6 / 2**20
    with record_step(job, "first"):
        held = np.ones(300 * 2**17)  # 300 MiB
        time.sleep(0.5)
        del held
    with record_step(job, "second"):
        time.sleep(0.3)
    first, second = (read_step(job, name).driver_peak_mib for name in ("first", "second"))
    assert first - before == pytest.approx(300, abs=30)
    # It fell back although the process's own peak has not.
    assert second < first - 200


def test_records_of_all_settings_are_read(job):
    earlier = {"verb": "encode_latents", "seconds": 12, "peak_memory_mib": 1.0}
    folder = Path(job.url("steps"))
    folder.mkdir()
    (folder / "0000-encode_latents.json").write_text(json.dumps(earlier))
    (folder / f"0000{DONE}").write_text('"digest"')
    assert read_steps(job) == [StepTime(verb="encode_latents", seconds=12.0, peak_memory_mib=1.0)]
