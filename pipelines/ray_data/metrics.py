"""What a running cluster tells Prometheus: rows, what workers do with their time, and the pace of a training.

Ray serves these on every node: a counter as `ray_<name>_total`, which stays when its process has ended, and
a gauge as `ray_<name>`, which does not. There are no histograms: Ray 2.60 makes their sums out of the middles
of their buckets.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Final

from ray.util.metrics import Counter, Gauge

from pipelines.tables.committer import CommitProgress

ROWS: Final = "snapfusion_rows"
STAGE_SECONDS: Final = "snapfusion_stage_seconds"
TRAINING_STEPS: Final = "snapfusion_training_steps"
TRAINING_SECONDS: Final = "snapfusion_training_seconds"
TRAINING_RUNS: Final = "snapfusion_training_runs"

WRITTEN: Final = "written"
"""The outcome of a row that was not set aside; any other outcome is a key of `rejection.REASONS`."""

_SECONDS_BETWEEN_TICKS = 5.0


class RowMeter:
    """Counts rows read, by what became of them; an `OnProgress`, called in the driver.

    Args:
        verb: the job whose rows they are; Prometheus has a label `job` of its own.
    """

    def __init__(self, verb: str) -> None:
        self._rows = Counter(ROWS, "Rows read, by what became of them.", tag_keys=("verb", "outcome"))
        self._rows.set_default_tags({"verb": verb})
        self._counted: dict[str, int] = {}

    def __call__(self, progress: CommitProgress) -> None:
        """Count what is new since the last call."""
        now = {WRITTEN: progress.rows - progress.rejected, **progress.reasons}
        for outcome, rows in now.items():
            if new := rows - self._counted.get(outcome, 0):
                self._rows.inc(new, tags={"outcome": outcome})
        self._counted = now


class StageClock:
    """Counts the seconds of one actor of a stage: "starting" until the first wait, then "waiting" or "busy".

    It counts every few seconds and not only when an item is finished: an actor that nothing comes to would
    otherwise never say that it waits, and one whose items take minutes would say so in leaps.

    Args:
        stage: whose actor.
    """

    def __init__(self, stage: str) -> None:
        self._seconds = Counter(
            STAGE_SECONDS, "What actors did with their time.", tag_keys=("stage", "state")
        )
        self._seconds.set_default_tags({"stage": stage})
        self._state, self._since = "starting", time.monotonic()
        self._lock = threading.Lock()
        threading.Thread(target=self._tick, name="stage-clock", daemon=True).start()

    def wait(self) -> None:
        """From now on the actor waits."""
        self._count("waiting")

    @contextmanager
    def busy(self) -> Iterator[None]:
        """The actor is busy within, and waits afterwards."""
        self._count("busy")
        try:
            yield
        finally:
            self._count("waiting")

    def _tick(self) -> None:
        while True:
            time.sleep(_SECONDS_BETWEEN_TICKS)
            self._count(None)

    def _count(self, state: str | None) -> None:
        """Add what passed to the state of until now, and go over to `state`, if there is one."""
        with self._lock:
            now = time.monotonic()
            if now > self._since:
                self._seconds.inc(now - self._since, tags={"state": self._state})
            self._state, self._since = state or self._state, now


class TrainingMeter(AbstractContextManager["TrainingMeter"]):
    """Counts the steps of one worker of a training, and their seconds: "waiting" for data, or "computing".

    Within it the training is said to run.

    Args:
        training: whose steps.
    """

    def __init__(self, training: str) -> None:
        self._steps = Counter(TRAINING_STEPS, "Optimizer steps, of each worker.", tag_keys=("training",))
        self._seconds = Counter(
            TRAINING_SECONDS, "What each worker's steps took.", tag_keys=("training", "state")
        )
        self._runs = Gauge(TRAINING_RUNS, "Whether a worker is in its training loop.", tag_keys=("training",))
        for metric in (self._steps, self._seconds, self._runs):
            metric.set_default_tags({"training": training})

    def __enter__(self) -> TrainingMeter:
        self._runs.set(1)
        return self

    def __exit__(self, *exception: object) -> None:
        self._runs.set(0)

    def add(self, *, seconds: float, data_seconds: float) -> None:
        """Count a step that took `seconds`, `data_seconds` of them waiting for its batch."""
        self._steps.inc()
        for state, took in (("waiting", data_seconds), ("computing", seconds - data_seconds)):
            if took > 0:
                self._seconds.inc(took, tags={"state": state})
