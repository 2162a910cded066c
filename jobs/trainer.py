"""Ray Train put round the training loop; the one place that knows `ray.train`.

Ray starts the workers, joins them to a process group and starts them again when one dies. What training
resumes from is in our own checkpoint store: Ray is told figures, never checkpoints.
"""

from __future__ import annotations

import copy
import json
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import ray.train
import torch
import torch.distributed as dist
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationInfo, field_validator
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.train.v2.api.exceptions import TrainingFailedError
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from jobs.logbook import Kind, Logbook, check_logbook
from jobs.reports import OnReport, reports_to
from pipelines.metrics import TrainingMeter
from pipelines.patience import patiently
from pipelines.schemas import to_png
from pipelines.storage import absolute, replace_object
from snapfusion.settings import Settings, differences, digest
from snapfusion.training.batch import Batch
from snapfusion.training.checkpoint import Checkpoint, CheckpointStore
from snapfusion.training.loop import LoopSettings, Objective, Step, UnusableStepError, new_state, train
from snapfusion.training.shards import shard
from snapfusion.training.state import Best, Groups, TrainState

Sharding = Literal["none", "fsdp"]

_SECONDS_BETWEEN_REPORTS = 2.0


class TrainerSettings(Settings):
    """How and where a training runs. None of it changes what is trained, beyond the order of float sums.

    Attributes:
        num_workers: processes, each of which takes its share of every global batch.
        min_workers: with how many of them it goes on while nodes are missing; None: with all or not at all.
            The batches stay the same, the order in which gradients are added does not: the weights then
            agree to rounding, no longer to the bit.
        resize_seconds: how often it is looked whether there is room for more workers.
        use_gpu: whether each has an accelerator; they then speak NCCL, else gloo.
        cpus_per_worker: logical CPUs that Ray sets aside for each.
        threads_per_worker: CPU threads of each.
        sharding: "none" keeps the whole training on each worker (DDP). "fsdp" spreads gradients, the
            optimizer's moments, the average and the weights over all, so that each keeps the whole network
            but once, at its first weights. The global batch is then a multiple of `num_workers`.
        micro_batch: rows of one forward pass; a larger share is accumulated.
        checkpoint_every: steps between checkpoints; the last step always has one.
        keep_checkpoints: how many of the newest stay while training runs.
        curve_every: steps between points of the curve that is kept, and of the logs.
        log_to: where the course of training is written for others to draw (see `jobs.logbook`).
        max_failures: how often the workers are started again after one of them died.
        labels: what a node must be labelled for workers to run there, as in {"role": "trainer"}: in a cluster
            that also has spot nodes, those that are not (see `pipelines.execution.Pool`).
    """

    num_workers: PositiveInt = 1
    min_workers: PositiveInt | None = None
    resize_seconds: PositiveFloat = 60.0
    use_gpu: bool = False
    cpus_per_worker: PositiveFloat = 1.0
    threads_per_worker: PositiveInt = 1
    sharding: Sharding = "none"
    micro_batch: PositiveInt = 16
    checkpoint_every: PositiveInt = 100
    keep_checkpoints: PositiveInt = 2
    curve_every: PositiveInt = 10
    log_to: tuple[Kind, ...] = ("tensorboard",)
    max_failures: NonNegativeInt = 2
    labels: dict[str, str] = Field(default_factory=dict)

    @field_validator("min_workers")
    @classmethod
    def _fewer_are_fewer(cls, fewer: int | None, known: ValidationInfo) -> int | None:
        most = known.data.get("num_workers")
        if fewer is not None and most is not None and fewer > most:
            raise ValueError(f"at most num_workers ({most}) are accepted")
        return fewer


class TrainingError(ValueError):
    """A training that cannot begin, go on or end with these settings and rows; the message says why."""


class TrainingFailed(RuntimeError):
    """Workers kept failing; what they had saved is there for the next try."""


class Batches(Iterator[Batch], Protocol):
    """This worker's share of successive global batches, without end."""

    def close(self) -> None:
        """End the threads that read ahead."""
        ...


class Loader(Protocol):
    """What a training reads (`pipelines.loader.BatchLoader`, `pipelines.branches.BranchLoader`)."""

    def batches(self, start: int, *, rank: int = 0, world: int = 1) -> Batches:
        """The share of `rank` in global batch `start`, `start` + 1, ..."""
        ...


@dataclass(frozen=True, kw_only=True)
class Look:
    """What a model is worth in the middle of its training.

    Attributes:
        values: to be kept, JSON values.
        figures: to be logged.
        score: what decides which weights are the best, the lower the better; None decides nothing.
        picture: to be looked at, uint8 [H,W,3].
    """

    values: dict[str, Any]
    figures: dict[str, float]
    score: float | None
    picture: np.ndarray


class Watch(Protocol):
    """Looks at a model every so many steps, and at the last; on the first worker."""

    every: int

    def __call__(self, weights: Mapping[str, torch.Tensor]) -> Look:
        """What those weights are worth; neither the weights nor any generator of numbers are changed."""
        ...


@dataclass(frozen=True, kw_only=True)
class Training:
    """One training, as each worker assembles it for itself.

    Attributes:
        name: names its checkpoints; a run under the same name continues.
        model: at its first weights, the same on every worker; on the worker's device.
        objective: what is minimised; called on the model's device.
        loader: gives the batches.
        settings: the loop's.
        identity: everything that decides the result, as JSON values; a checkpoint of another is refused.
        evaluate: called on the first worker with the final weights in `model`; gives JSON values.
        watch: called on the first worker as training goes on with the weights of then, averaged where
            that is done; the best are kept.
        leaves_out: whether a step may leave parts of the model out, which then have no gradient.
    """

    name: str
    model: nn.Module
    objective: Objective
    loader: Loader
    settings: LoopSettings
    identity: dict[str, Any]
    evaluate: Callable[[], dict[str, Any]] = field(default=dict)
    watch: Watch | None = None
    leaves_out: bool = False


Program = Callable[..., Iterable[Training]]
"""Assembles trainings for the torch device it is given as `device`; called in each worker.

They run one after the other. It stands in an importable module, as workers import it.
"""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a training left.

    Attributes:
        checkpoint: the last, verified, without the optimizer.
        evaluation: what `Training.evaluate` said.
        environment: workers, threads, device and versions it ran with.
    """

    checkpoint: Checkpoint
    evaluation: dict[str, Any]
    environment: dict[str, Any]

    @property
    def curve(self) -> list[dict[str, float]]:
        """step, loss, grad_norm, learning_rate and the objective's figures, every so many steps."""
        return list(self.checkpoint.values["state"]["curve"])

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """The final weights: the average where one was kept."""
        return self.checkpoint.tensors.get("ema", self.raw_weights)

    @property
    def raw_weights(self) -> dict[str, torch.Tensor]:
        """The last weights, no average of them."""
        return self.checkpoint.tensors["model"]

    @property
    def watched(self) -> list[dict[str, Any]]:
        """step, and what `Training.watch` kept of it, for each look."""
        return list(self.checkpoint.values["state"]["watched"])

    @property
    def best(self) -> Best | None:
        """The best weights that `Training.watch` saw, if it did."""
        best = self.checkpoint.values["state"]["best"]
        return Best(**best, weights=self.checkpoint.tensors["best"]) if best else None


def run_trainings(
    program: Program,
    arguments: Mapping[str, Any],
    *,
    store_url: str,
    settings: TrainerSettings,
    on_report: OnReport,
) -> dict[str, Trained]:
    """Run the trainings of `program(**arguments, device=...)` under Ray Train, each to its end.

    Killed at any moment and called again with the same `store_url`, it continues from the last complete
    checkpoints; on CPUs with the same workers and threads the weights end bit for bit the same.

    Args:
        program: what to train.
        arguments: of `program`; small, and picklable.
        store_url: of all checkpoints, which every worker must be able to reach; logs lie there too, in
            `logs/` and the training's name.
        settings: the workers.
        on_report: told of every report, in this process.

    Returns:
        What each left, by name.

    Raises:
        TrainingError: if a loss is not finite or too large, or a checkpoint is of another training. The ids
            of the rows of such a loss are saved beside the checkpoints, as `<name>.stopped.json`.
        LogbookError: if logs cannot be kept as the settings say.
        TrainingFailed: if workers keep failing.
    """
    check_logbook(settings.log_to)
    if settings.min_workers is not None:
        # Right after a node is gone Ray still counts on it, and waits so long for its place.
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "15")
    with tempfile.TemporaryDirectory() as scratch, reports_to(on_report) as mailbox:
        config = {
            "program": program,
            "arguments": dict(arguments),
            "store_url": absolute(store_url),  # workers stand in another folder
            "settings": settings,
            "mailbox": mailbox,
        }
        trainer = _Trainer(
            _work,  # type: ignore[arg-type] # what it returns is handed on, which the annotation does not know
            train_loop_config=config,
            torch_config=TorchConfig(backend="nccl" if settings.use_gpu else "gloo"),
            scaling_config=ScalingConfig(  # type: ignore[call-arg] # mypy sees the class of Train V1
                num_workers=_workers(settings),  # type: ignore[arg-type] # likewise
                elastic_resize_monitor_interval_s=settings.resize_seconds,
                use_gpu=settings.use_gpu,
                resources_per_worker=_resources(settings),
                label_selector=settings.labels or None,
            ),
            # Ray's own registry of checkpoints stays empty, so a folder on the driver's node will do, and a
            # new name each time: continuing is decided by our store alone.
            run_config=RunConfig(
                name=uuid.uuid4().hex,
                storage_path=scratch,
                failure_config=FailureConfig(max_failures=settings.max_failures),
            ),
        )
        try:
            outcome: _Outcome = trainer.fit().return_value  # type: ignore[attr-defined]
        except TrainingFailedError as error:
            raise TrainingFailed(f"training failed: {_cause(error)}") from None
    if outcome.failure is not None:
        raise TrainingError(outcome.failure)
    return {
        name: Trained(
            checkpoint=CheckpointStore(f"{store_url}/{name}").load(end.step, without=("optimizer",)),
            evaluation=end.evaluation,
            environment=end.environment,
        )
        for name, end in outcome.ends.items()
    }


class _Trainer(TorchTrainer):
    """Ray's, but for Ctrl-C, which stays the command's.

    Ray would keep it for the rest of the process's life, and end that as if all were done.
    """

    def _register_sigint_handler(self, controller: object) -> None:
        """Ray calls this from `fit`."""


@dataclass(frozen=True, kw_only=True)
class _End:
    step: int
    evaluation: dict[str, Any]
    environment: dict[str, Any]


@dataclass(kw_only=True)
class _Outcome:
    """What a worker returns: how each training ended, or a verdict on which trying again cannot help."""

    ends: dict[str, _End] = field(default_factory=dict)
    failure: str | None = None


def _work(config: dict[str, Any]) -> _Outcome:
    """The worker's whole life."""
    settings: TrainerSettings = config["settings"]
    torch.set_num_threads(settings.threads_per_worker)
    outcome = _Outcome()
    try:
        for training in config["program"](**config["arguments"], device=get_device()):
            store = CheckpointStore(f"{config['store_url']}/{training.name}", keep=settings.keep_checkpoints)
            outcome.ends[training.name] = _run(
                training, store=store, settings=settings, mailbox=config["mailbox"]
            )
    except UnusableStepError as error:
        place = f"{config['store_url']}/{training.name}.stopped.json"
        if ray.train.get_context().get_world_rank() == 0:
            told = {"step": error.step, "reason": str(error), "rows": error.rows}
            replace_object(place, json.dumps(told, indent=1).encode())
        outcome.failure = f"{error}; all their ids are in {place}"
    except TrainingError as error:
        # All workers came to the same verdict. Raised, it would make Ray start them again in vain.
        outcome.failure = str(error)
    return outcome


def _run(
    training: Training,
    *,
    store: CheckpointStore,
    settings: TrainerSettings,
    mailbox: Any,  # noqa: ANN401 - an actor handle
) -> _End:
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    check_shares(training.settings.global_batch, world=world, sharding=settings.sharding)
    device = next(training.model.parameters()).device
    spread = settings.sharding == "fsdp" and world > 1
    # Spread is a copy: what evaluates must run on one worker, and is given the whole network.
    model = shard(copy.deepcopy(training.model), device=device) if spread else training.model
    state = new_state(model, settings=training.settings)
    resume(state, store=store, identity=training.identity, rank=rank)
    batches = training.loader.batches(state.step, rank=rank, world=world)
    with (
        closing(batches),
        _logbook(training, store=store, done=state.step, settings=settings, rank=rank) as logbook,
        TrainingMeter(training.name) as meter,
    ):
        train(
            state,
            objective=training.objective,
            batches=batches,
            settings=training.settings,
            micro_batch=settings.micro_batch,
            wrapped=_distribute(training, model) if world > 1 and not spread else None,
            after_step=_Recorder(
                training,
                state=state,
                store=store,
                settings=settings,
                mailbox=mailbox,
                logbook=logbook,
                meter=meter,
            ),
        )
    evaluation, weights = {}, state.final_weights()
    if rank == 0:
        state.optimizer.state.clear()  # twice the model's size, which the evaluation may need
        training.model.load_state_dict(weights)
        evaluation = training.evaluate()
    return _End(step=state.step, evaluation=evaluation, environment=_environment(settings, device=device))


def check_shares(global_batch: int, *, world: int, sharding: Sharding) -> None:
    """Whether `world` workers can share a global batch of so many rows.

    Raises:
        TrainingError: if there are too few rows, or if workers over which a network is spread would have
            shares that differ: they gather it together, piece by piece, and one would wait for ever.
    """
    if world > global_batch:
        raise TrainingError(f"{world} workers cannot share a global batch of {global_batch} rows")
    if sharding == "fsdp" and global_batch % world:
        raise TrainingError(
            f"{world} workers cannot share a global batch of {global_batch} rows evenly, which sharding=fsdp "
            "needs; take a multiple, or sharding=none"
        )


def resume(state: TrainState, *, store: CheckpointStore, identity: dict[str, Any], rank: int) -> None:
    """Continue from the newest good checkpoint, if there is one, on all workers from the same.

    Raises:
        TrainingError: if that checkpoint is of another training; names what differs.
    """
    found = patiently(store.url, store.newest) if rank == 0 else None
    step = [found.step if found else None]
    if dist.is_initialized():
        dist.broadcast_object_list(step, src=0)
    if (last := step[0]) is None:
        return
    checkpoint = found or patiently(store.url, lambda: store.load(last))
    differing = list(differences(checkpoint.values["identity"], identity))
    if differing:
        raise TrainingError(
            f"the checkpoints in {store.url} are of another training: {'; '.join(differing[:3])}; "
            "finish that one with its settings, or remove them"
        )
    state.restore(checkpoint.tensors, checkpoint.values["state"])


def save(store: CheckpointStore, step: int, *, tensors: Groups, values: Mapping[str, Any]) -> None:
    """Save a checkpoint, waiting for a store that fails for a moment: to start workers again takes longer."""
    patiently(store.url, lambda: store.save(step, tensors=tensors, values=values))


def _distribute(training: Training, model: nn.Module) -> nn.Module:
    on_cpu = next(model.parameters()).device.type == "cpu"
    # The search for unused parameters keeps DDP from arranging its buckets anew after the first step. Three
    # and more CPU workers add in an order that follows the buckets, and a resumed run must add in the same.
    return DistributedDataParallel(model, find_unused_parameters=on_cpu or training.leaves_out)


def _logbook(
    training: Training, *, store: CheckpointStore, done: int, settings: TrainerSettings, rank: int
) -> AbstractContextManager[Logbook | None]:
    """What the first worker writes the training's course to; the others write none."""
    if rank != 0:
        return nullcontext()
    run, _, name = store.url.rpartition("/")
    return Logbook(
        settings.log_to,
        url=f"{run}/logs/{name}",
        run=digest({"place": store.url, "identity": training.identity})[:16],
        name=f"{run.rpartition('/')[2].removesuffix('.training')}/{name}",
        done=done,
        settings=training.identity,
    )


class _Pace:
    """How fast steps were since it was last asked."""

    def __init__(self) -> None:
        self._seconds, self._data_seconds, self._steps = 0.0, 0.0, 0

    def add(self, step: Step) -> None:
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


class _Recorder:
    """After each step: the curve and logs, a checkpoint, and word of the progress, where they are due."""

    def __init__(
        self,
        training: Training,
        *,
        state: TrainState,
        store: CheckpointStore,
        settings: TrainerSettings,
        mailbox: Any,  # noqa: ANN401 - an actor handle
        logbook: Logbook | None,
        meter: TrainingMeter,
    ) -> None:
        self._training, self._state, self._store = training, state, store
        self._settings, self._mailbox, self._logbook = settings, mailbox, logbook
        self._first = ray.train.get_context().get_world_rank() == 0
        self._logged, self._reported = _Pace(), _Pace()
        self._meter = meter
        self._told = 0.0

    def __call__(self, step: Step) -> None:
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
                save(self._store, step.step, tensors=tensors, values=values)
        due = last or time.monotonic() - self._told > _SECONDS_BETWEEN_REPORTS
        if not (saved or (self._first and due)):
            return
        figures = self._figures(step)
        if self._first:
            self._mailbox.put.remote(figures)
            self._told = time.monotonic()
        if saved:
            # Ray collects reports every two seconds, and a worker waits for that: so not at every step.
            ray.train.report(figures)

    def _note(self, step: Step) -> None:
        """A point of the curve."""
        point = {"loss": step.loss, "grad_norm": step.grad_norm, "learning_rate": step.learning_rate}
        told = {**point, **step.figures}
        self._state.curve.append({"step": step.step, **told})
        if self._logbook is not None:
            self._logbook.scalars({**told, **self._logged.take()}, step=step.step)

    def _look(self, watch: Watch, weights: Mapping[str, torch.Tensor], *, step: int) -> None:
        """What the weights are worth, and whether they are the best."""
        look = watch(weights)
        self._state.watched.append({"step": step, **look.values})
        best = self._state.best
        if look.score is not None and (best is None or look.score < best.score):
            kept = {name: tensor.detach().to("cpu", copy=True) for name, tensor in weights.items()}
            self._state.best = Best(step=step, score=look.score, weights=kept)
        run, _, _ = self._store.url.rpartition("/")
        replace_object(f"{run}/watch/step-{step:08d}.png", to_png(look.picture))
        if self._logbook is not None:
            self._logbook.scalars(look.figures, step=step)
            self._logbook.picture("watch/pictures", look.picture, step=step)

    def _figures(self, step: Step) -> dict[str, Any]:
        """The figures since the last report."""
        pace, num_steps = self._reported.take(), self._training.settings.num_steps
        return {
            "training": self._training.name,
            "step": step.step,
            "num_steps": num_steps,
            "workers": ray.train.get_context().get_world_size(),
            "loss": step.loss,
            "seconds_left": (num_steps - step.step) / pace["steps_per_second"],
            **pace,
        }


def _workers(settings: TrainerSettings) -> int | tuple[int, int]:
    return (
        settings.num_workers if settings.min_workers is None else (settings.min_workers, settings.num_workers)
    )


def _resources(settings: TrainerSettings) -> dict[str, float]:
    resources = {"CPU": settings.cpus_per_worker}
    return {**resources, "GPU": 1.0} if settings.use_gpu else resources


def _environment(settings: TrainerSettings, *, device: torch.device) -> dict[str, Any]:
    accelerator = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return {
        "workers": ray.train.get_context().get_world_size(),
        "threads_per_worker": torch.get_num_threads(),
        "device": f"{device.type} {accelerator or torch.backends.cpu.get_cpu_capability()}",
        "torch": torch.__version__,
    }


def _cause(error: TrainingFailedError) -> str:
    """The first worker's error in one line."""
    failures = getattr(error, "worker_failures", {})
    causes = [str(failures[rank]).strip() for rank in sorted(failures)]
    return next((cause.splitlines()[-1] for cause in causes if cause), str(error).strip().splitlines()[0])
