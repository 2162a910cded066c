"""What is kept and told of a training's steps: its curve, its logs, its checkpoints, its progress."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from jobs.training.loggers import Loggers
from jobs.training.settings import TrainerSettings
from jobs.training.spec import Training, Validation
from pipelines.ray_data.metrics import TrainingMeter
from pipelines.storage.objects import replace_object
from pipelines.storage.retry import with_retries
from pipelines.tables.schemas import to_png
from snapfusion.settings import digest
from snapfusion.training.checkpoint import CheckpointStore
from snapfusion.training.loop import StepResult
from snapfusion.training.state import BestWeights, TensorGroups, TrainState

_SECONDS_BETWEEN_REPORTS = 2.0


def save_with_retries(
    store: CheckpointStore, step: int, *, tensors: TensorGroups, values: Mapping[str, Any]
) -> None:
    """Save a checkpoint, waiting for a store that fails for a moment: to start workers again takes longer."""
    with_retries(store.url, lambda: store.save(step, tensors=tensors, values=values))


def open_loggers(
    training: Training, *, store: CheckpointStore, done: int, settings: TrainerSettings, rank: int
) -> AbstractContextManager[Loggers | None]:
    """What the first worker writes the training's course to; the others write none."""
    if rank != 0:
        return nullcontext()
    run, _, name = store.url.rpartition("/")
    return Loggers(
        settings.log_to,
        url=f"{run}/logs/{name}",
        run=digest({"place": store.url, "identity": training.identity})[:16],
        name=f"{run.rpartition('/')[2].removesuffix('.training')}/{name}",
        done=done,
        settings=training.identity,
    )


class _Throughput:
    """How fast steps were since it was last asked."""

    def __init__(self) -> None:
        self._seconds, self._data_seconds, self._steps = 0.0, 0.0, 0

    def add(self, step: StepResult) -> None:
        """Count a step in."""
        self._seconds += step.seconds
        self._data_seconds += step.data_seconds
        self._steps += 1

    def take(self) -> dict[str, float]:
        """The figures, from which counting then begins anew."""
        figures = {
            "steps_per_second": self._steps / self._seconds,
            "data_wait": self._data_seconds / self._seconds,
        }
        self._seconds, self._data_seconds, self._steps = 0.0, 0.0, 0
        return figures


class TrainingCallback:
    """After each step: the curve and logs, a checkpoint, and word of the progress, where they are due.

    Args:
        training: whose steps they are.
        state: of it, on this worker.
        store: of its checkpoints.
        settings: how often what is due.
        rank: of this worker; the first writes what there is one of.
        world: how many workers there are.
        mailbox: an actor that takes figures (see `jobs.training.progress_channel`).
        report: tells Ray of a checkpoint's figures; called on every rank.
        logbook: of the training; None on the others.
        meter: counts this worker's seconds.
    """

    def __init__(
        self,
        training: Training,
        *,
        state: TrainState,
        store: CheckpointStore,
        settings: TrainerSettings,
        rank: int,
        world: int,
        mailbox: Any,  # noqa: ANN401 - an actor handle
        report: Callable[[dict[str, Any]], None],
        logbook: Loggers | None,
        meter: TrainingMeter,
    ) -> None:
        self._training, self._state, self._store = training, state, store
        self._settings, self._mailbox, self._logbook = settings, mailbox, logbook
        self._report, self._first, self._world = report, rank == 0, world
        self._logged, self._reported = _Throughput(), _Throughput()
        self._meter = meter
        self._told = 0.0

    def __call__(self, step: StepResult) -> None:
        """Called on every rank."""
        self._logged.add(step)
        self._reported.add(step)
        self._meter.add(seconds=step.seconds, data_seconds=step.data_seconds)
        last = step.step == self._training.settings.num_steps
        if last or step.step % self._settings.curve_every == 0:
            self._note(step)
        watch = self._training.watch
        if watch is not None and (last or step.step % watch.every == 0):
            weights = self._state.final_weights()
            if self._first:
                self._look(watch, weights, step=step.step)
        saved = last or step.step % self._settings.checkpoint_every == 0
        if saved and self._logbook is not None:
            # Before the checkpoint: what was said up to it must be there when it is gone on from.
            self._logbook.flush()
        if saved:
            tensors = self._state.tensors()
            values = {"state": self._state.values(), "identity": self._training.identity}
            if self._first:
                save_with_retries(self._store, step.step, tensors=tensors, values=values)
        due = last or time.monotonic() - self._told > _SECONDS_BETWEEN_REPORTS
        if not (saved or (self._first and due)):
            return
        figures = self._figures(step)
        if self._first:
            self._mailbox.put.remote(figures)
            self._told = time.monotonic()
        if saved:
            # Ray collects reports every two seconds, and a worker waits for that: so not at every step.
            self._report(figures)

    def _note(self, step: StepResult) -> None:
        """A point of the curve."""
        point = {"loss": step.loss, "grad_norm": step.grad_norm, "learning_rate": step.learning_rate}
        told = {**point, **step.metrics}
        self._state.curve.append({"step": step.step, **told})
        if self._logbook is not None:
            self._logbook.scalars({**told, **self._logged.take()}, step=step.step)

    def _look(self, watch: Validation, weights: Mapping[str, torch.Tensor], *, step: int) -> None:
        """What the weights are worth, and whether they are the best."""
        look = watch(weights)
        self._state.validations.append({"step": step, **look.values})
        best = self._state.best
        if look.score is not None and (best is None or look.score < best.score):
            kept = {name: tensor.detach().to("cpu", copy=True) for name, tensor in weights.items()}
            self._state.best = BestWeights(step=step, score=look.score, weights=kept)
        run, _, _ = self._store.url.rpartition("/")
        replace_object(f"{run}/watch/step-{step:08d}.png", to_png(look.picture))
        if self._logbook is not None:
            self._logbook.scalars(look.figures, step=step)
            self._logbook.picture("watch/pictures", look.picture, step=step)

    def _figures(self, step: StepResult) -> dict[str, Any]:
        """The figures since the last report."""
        pace, num_steps = self._reported.take(), self._training.settings.num_steps
        return {
            "training": self._training.name,
            "step": step.step,
            "num_steps": num_steps,
            "workers": self._world,
            "loss": step.loss,
            "seconds_left": (num_steps - step.step) / pace["steps_per_second"],
            **pace,
        }
