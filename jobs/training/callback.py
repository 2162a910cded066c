"""Records each training step: curve, logs, validation, checkpoint, progress report."""

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
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
from snapfusion.training.networks import MODEL
from snapfusion.training.state import BestWeights, TensorGroups, TrainState

_SECONDS_BETWEEN_REPORTS = 2.0


def save_with_retries(
    store: CheckpointStore, step: int, *, tensors: TensorGroups, values: Mapping[str, Any]
) -> None:
    """Save a checkpoint, retrying transient errors of the store: restarting the workers takes longer."""
    with_retries(store.url, lambda: store.save(step, tensors=tensors, values=values))


def open_loggers(
    training: Training, *, store: CheckpointStore, done: int, settings: TrainerSettings, rank: int
) -> AbstractContextManager[Loggers | None]:
    """The loggers of rank 0; None on the other ranks."""
    if rank != 0:
        return nullcontext()
    run_url, _, name = store.url.rpartition("/")
    return Loggers(
        settings.log_to,
        url=f"{run_url}/logs/{name}",
        # Resumed runs find their logs by this id: its keys must not change.
        run=digest({"place": store.url, "identity": training.identity})[:16],
        name=f"{run_url.rpartition('/')[2].removesuffix('.training')}/{name}",
        done=done,
        settings=training.identity,
    )


@dataclass
class _Throughput:
    """Steps per second, and the share of time spent waiting for data, since the last `reset`."""

    seconds: float = 0.0
    data_seconds: float = 0.0
    steps: int = 0

    def add(self, step: StepResult) -> None:
        self.seconds += step.seconds
        self.data_seconds += step.data_seconds
        self.steps += 1

    def reset(self) -> dict[str, float]:
        """Return the values, and begin anew."""
        values = {
            "steps_per_second": self.steps / self.seconds,
            "data_wait": self.data_seconds / self.seconds,
        }
        self.seconds, self.data_seconds, self.steps = 0.0, 0.0, 0
        return values


@dataclass(kw_only=True)
class TrainingCallback:
    """Called after each step, on every rank; rank 0 writes what there is one of.

    Attributes:
        training: that runs.
        state: of the training, on this worker.
        store: of its checkpoints.
        settings: interval of each action.
        rank: of this worker.
        world: number of workers.
        queue: actor that takes reports (see `jobs.training.progress_channel`).
        report: passes figures to Ray Train; must be called on every rank.
        loggers: on rank 0; None on the others.
        meter: Prometheus metrics of this worker.
    """

    training: Training
    state: TrainState
    store: CheckpointStore
    settings: TrainerSettings
    rank: int
    world: int
    queue: Any
    report: Callable[[dict[str, Any]], None]
    loggers: Loggers | None
    meter: TrainingMeter
    _logged: _Throughput = field(default_factory=_Throughput, init=False)
    _reported: _Throughput = field(default_factory=_Throughput, init=False)
    _last_report: float = field(default=0.0, init=False)

    def __call__(self, step: StepResult) -> None:
        """Called on every rank."""
        self._logged.add(step)
        self._reported.add(step)
        self.meter.add(seconds=step.seconds, data_seconds=step.data_seconds)
        last = step.step == self.training.settings.num_steps
        # Of several networks each is logged after so many steps of its own.
        if last or self.state.networks[step.network].updates % self.settings.curve_every == 0:
            self._log(step)
        validation = self.training.validation
        if validation is not None and (last or step.step % validation.every == 0):
            # Gathers sharded weights, so every rank must call it.
            weights = self.state.final_weights()
            if self.rank == 0:
                self._validate(validation, weights, step=step.step)
        save = last or step.step % self.settings.checkpoint_every == 0
        if save:
            self._save(step.step)
        due = last or time.monotonic() - self._last_report > _SECONDS_BETWEEN_REPORTS
        if not (save or (self.rank == 0 and due)):
            return
        report = self._progress(step)
        if self.rank == 0:
            self.queue.put.remote(report)
            self._last_report = time.monotonic()
        if save:
            # Ray collects reports every two seconds, and a worker waits for that: so not at every step.
            self.report(report)

    def _log(self, step: StepResult) -> None:
        """Add a point to the curve and to the logs."""
        prefix = "" if step.network == MODEL else f"{step.network}/"
        point = {
            f"{prefix}loss": step.loss,
            f"{prefix}grad_norm": step.grad_norm,
            f"{prefix}learning_rate": step.learning_rate,
            **step.metrics,
        }
        self.state.curve.append({"step": step.step, **point})
        if self.loggers is not None:
            self.loggers.scalars({**point, **self._logged.reset()}, step=step.step)

    def _validate(self, validation: Validation, weights: Mapping[str, torch.Tensor], *, step: int) -> None:
        result = validation(weights)
        self.state.validations.append({"step": step, **result.record})
        best = self.state.best
        if result.score is not None and (best is None or result.score < best.score):
            # A copy: training goes on in these tensors.
            copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in weights.items()}
            self.state.best = BestWeights(step=step, score=result.score, weights=copies)
        run_url, _, _ = self.store.url.rpartition("/")
        replace_object(f"{run_url}/watch/step-{step:08d}.png", to_png(result.image))
        if self.loggers is not None:
            self.loggers.scalars(result.scalars, step=step)
            self.loggers.image("watch/pictures", result.image, step=step)

    def _save(self, step: int) -> None:
        if self.loggers is not None:
            # Before the checkpoint: a run that resumes from it must find all earlier steps in the logs.
            self.loggers.flush()
        tensors = self.state.tensors()
        values = {"state": self.state.values(), "identity": self.training.identity}
        if self.rank == 0:
            save_with_retries(self.store, step, tensors=tensors, values=values)

    def _progress(self, step: StepResult) -> dict[str, Any]:
        """The report since the last one."""
        throughput, num_steps = self._reported.reset(), self.training.settings.num_steps
        return {
            "training": self.training.name,
            "step": step.step,
            "num_steps": num_steps,
            "workers": self.world,
            "loss": step.loss,
            "seconds_left": (num_steps - step.step) / throughput["steps_per_second"],
            **throughput,
        }
