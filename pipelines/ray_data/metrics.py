"""Exports Prometheus metrics: rows, the time of stages, and the throughput of a training.

Ray serves them on every node: a counter as `ray_<name>_total`, which stays when its process has ended, and a
gauge as `ray_<name>`, which does not. There are no histograms: Ray 2.60 estimates their sums from the middles
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
"""The outcome of a row that was not rejected; any other outcome is a key of `rejections.REASONS`."""

_SECONDS_BETWEEN_TICKS = 5.0


class RowMeter:
    """Counts rows read, by outcome; an `OnProgress`, called in the driver.

    Args:
        verb: the job; Prometheus has a label `job` of its own.
    """

    def __init__(self, verb: str) -> None:
        self._rows = Counter(ROWS, "Rows read, by outcome.", tag_keys=("verb", "outcome"))
        self._rows.set_default_tags({"verb": verb})
        self._counted: dict[str, int] = {}

    def __call__(self, progress: CommitProgress) -> None:
        """Count the rows since the last call."""
        now = {WRITTEN: progress.rows - progress.rejected, **progress.reasons}
        for outcome, rows in now.items():
            if new := rows - self._counted.get(outcome, 0):
                self._rows.inc(new, tags={"outcome": outcome})
        self._counted = now


class StageClock:
    """Counts the seconds of an actor of a stage: "starting" until the first wait, then "waiting" or "busy".

    It counts every few seconds and not only after an item: an idle actor would otherwise never report that it
    waits, and one whose items take minutes would report in leaps.

    Args:
        stage: of the actor.
    """

    def __init__(self, stage: str) -> None:
        self._seconds = Counter(STAGE_SECONDS, "Seconds of actors, by state.", tag_keys=("stage", "state"))
        self._seconds.set_default_tags({"stage": stage})
        self._state, self._since = "starting", time.monotonic()
        self._lock = threading.Lock()
        threading.Thread(target=self._tick, name="stage-clock", daemon=True).start()

    def wait(self) -> None:
        """Count as waiting from now on."""
        self._count("waiting")

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Count as busy within the context, and as waiting afterwards."""
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
        """Add the time since the last call to the present state, and change to `state` unless it is None."""
        with self._lock:
            now = time.monotonic()
            if now > self._since:
                self._seconds.inc(now - self._since, tags={"state": self._state})
            self._state, self._since = state or self._state, now


class TrainingMeter(AbstractContextManager["TrainingMeter"]):
    """Counts the steps of one training worker and their seconds: "waiting" for data, or "computing".

    Within its context the training is reported as running.

    Args:
        training: its name.
    """

    def __init__(self, training: str) -> None:
        self._steps = Counter(TRAINING_STEPS, "Optimizer steps of each worker.", tag_keys=("training",))
        self._seconds = Counter(
            TRAINING_SECONDS, "Seconds of each worker's steps.", tag_keys=("training", "state")
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
        for state, spent in (("waiting", data_seconds), ("computing", seconds - data_seconds)):
            if spent > 0:
                self._seconds.inc(spent, tags={"state": state})
