"""The Prometheus metrics, without a cluster; tests/infra/test_cluster_run.py scrapes one."""

from collections import Counter as Count

import pytest

from pipelines.ray_data import metrics
from pipelines.ray_data.metrics import RowMeter, StageClock, TrainingMeter
from pipelines.tables.committer import CommitProgress


@pytest.fixture
def counted(monkeypatch):
    """(metric, values of its tags) -> total; the keys of all tags must be declared."""
    totals = Count()

    class Counter:
        def __init__(self, name, description, *, tag_keys):
            self.name, self.keys, self.default = name, set(tag_keys), {}

        def set_default_tags(self, tags):
            self.default = tags

        def inc(self, value=1.0, tags=None):
            assert value > 0  # Ray refuses others
            tags = {**self.default, **(tags or {})}
            assert tags.keys() == self.keys
            totals[self.name, *tags.values()] += value

    class Gauge(Counter):
        def set(self, value):
            totals[self.name, *self.default.values()] = value

    monkeypatch.setattr(metrics, "Counter", Counter)
    monkeypatch.setattr(metrics, "Gauge", Gauge)
    return totals


def test_rows_are_counted_once_by_outcome(counted):
    meter = RowMeter("encode_latents")
    first = CommitProgress(rows=10, rejected=2, reasons={"unsafe": 2})
    second = CommitProgress(rows=30, rejected=5, reasons={"unsafe": 2, "torn_shard": 3})
    for progress in (first, first, second):
        meter(progress)
    rows = (metrics.ROWS, "encode_latents")
    assert counted == {(*rows, "written"): 25, (*rows, "unsafe"): 2, (*rows, "torn_shard"): 3}


def test_stage_seconds_are_counted_idle_and_busy(counted, monkeypatch):
    now = 100.0
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now)
    monkeypatch.setattr(metrics.threading.Thread, "start", lambda thread: None)
    clock = StageClock("GeneratePairs")
    seconds = (metrics.STAGE_SECONDS, "GeneratePairs")
    tick = lambda: clock._count(None)  # noqa: E731
    now += 7
    clock.wait()
    now += 20
    tick()
    assert counted == {(*seconds, "starting"): 7, (*seconds, "waiting"): 20}
    with clock.busy():
        now += 3
        tick()
        assert counted[*seconds, "busy"] == 3
        now += 2
    tick()
    assert counted[*seconds, "busy"] == 5
    assert counted.total() == 32


def test_failed_stage_is_not_busy(counted):
    clock = StageClock("GeneratePairs")
    with pytest.raises(ZeroDivisionError), clock.busy():
        raise ZeroDivisionError
    assert clock._state == "waiting"


def test_step_seconds_are_waiting_or_computing(counted):
    with TrainingMeter("vpred") as meter:
        meter.add(seconds=2.0, data_seconds=0.5)
        meter.add(seconds=1.0, data_seconds=0.0)
        meter.add(seconds=0.25, data_seconds=0.25)
        assert counted[metrics.TRAINING_RUNS, "vpred"] == 1
    assert counted == {
        (metrics.TRAINING_STEPS, "vpred"): 3,
        (metrics.TRAINING_SECONDS, "vpred", "waiting"): 0.75,
        (metrics.TRAINING_SECONDS, "vpred", "computing"): 2.5,
        (metrics.TRAINING_RUNS, "vpred"): 0,
    }
