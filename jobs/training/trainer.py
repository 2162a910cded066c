"""Ray Train put round the training loop; the one place that knows `ray.train`.

Ray starts the workers, joins them to a process group and starts them again when one dies. What training
resumes from is in our own checkpoint store: Ray is told figures, never checkpoints.
"""

from __future__ import annotations

import copy
import json
import os
import tempfile
import uuid
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import ray.train
import torch
import torch.distributed as dist
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.train.v2.api.exceptions import TrainingFailedError
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from jobs.training.callback import TrainingCallback, open_loggers
from jobs.training.loggers import check_loggers
from jobs.training.progress_channel import OnReport, progress_channel
from jobs.training.settings import Sharding, TrainerSettings
from jobs.training.spec import Training, TrainingError, TrainingFactory
from pipelines.ray_data.metrics import TrainingMeter
from pipelines.storage.objects import absolute_url, replace_object
from pipelines.storage.retry import with_retries
from snapfusion.settings import differences
from snapfusion.training.checkpoint import Checkpoint, CheckpointStore
from snapfusion.training.fsdp import shard
from snapfusion.training.loop import UnusableStepError, new_state, train
from snapfusion.training.state import BestWeights, TrainState


class TrainingFailed(RuntimeError):
    """Workers kept failing; what they had saved is there for the next try."""


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
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
    def best(self) -> BestWeights | None:
        """The best weights that `Training.watch` saw, if it did."""
        best = self.checkpoint.values["state"]["best"]
        return BestWeights(**best, weights=self.checkpoint.tensors["best"]) if best else None


def run_trainings(
    program: TrainingFactory,
    arguments: Mapping[str, Any],
    *,
    store_url: str,
    settings: TrainerSettings,
    on_report: OnReport,
) -> dict[str, TrainingResult]:
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
    check_loggers(settings.log_to)
    if settings.min_workers is not None:
        # Right after a node is gone Ray still counts on it, and waits so long for its place.
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "15")
    with tempfile.TemporaryDirectory() as scratch, progress_channel(on_report) as mailbox:
        config = {
            "program": program,
            "arguments": dict(arguments),
            "store_url": absolute_url(store_url),  # workers stand in another folder
            "settings": settings,
            "mailbox": mailbox,
        }
        trainer = _TrainerWithoutSigint(
            _worker_loop,  # type: ignore[arg-type] # what it returns is handed on, which the annotation does not know
            train_loop_config=config,
            torch_config=TorchConfig(backend="nccl" if settings.use_gpu else "gloo"),
            scaling_config=ScalingConfig(  # type: ignore[call-arg] # mypy sees the class of Train V1
                num_workers=_num_workers(settings),  # type: ignore[arg-type] # likewise
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
            outcome: _WorkerResult = trainer.fit().return_value  # type: ignore[attr-defined]
        except TrainingFailedError as error:
            raise TrainingFailed(f"training failed: {_cause(error)}") from None
    if outcome.failure is not None:
        raise TrainingError(outcome.failure)
    return {
        name: TrainingResult(
            checkpoint=CheckpointStore(f"{store_url}/{name}").load(end.step, without=("optimizer",)),
            evaluation=end.evaluation,
            environment=end.environment,
        )
        for name, end in outcome.ends.items()
    }


class _TrainerWithoutSigint(TorchTrainer):
    """Ray's, but for Ctrl-C, which stays the command's.

    Ray would keep it for the rest of the process's life, and end that as if all were done.
    """

    def _register_sigint_handler(self, controller: object) -> None:
        """Ray calls this from `fit`."""


@dataclass(frozen=True, kw_only=True)
class _FinishedTraining:
    step: int
    evaluation: dict[str, Any]
    environment: dict[str, Any]


@dataclass(kw_only=True)
class _WorkerResult:
    """What a worker returns: how each training ended, or a verdict on which trying again cannot help."""

    ends: dict[str, _FinishedTraining] = field(default_factory=dict)
    failure: str | None = None


def _worker_loop(config: dict[str, Any]) -> _WorkerResult:
    """The worker's whole life."""
    settings: TrainerSettings = config["settings"]
    torch.set_num_threads(settings.threads_per_worker)
    outcome = _WorkerResult()
    try:
        for training in config["program"](**config["arguments"], device=get_device()):
            store = CheckpointStore(f"{config['store_url']}/{training.name}", keep=settings.keep_checkpoints)
            outcome.ends[training.name] = _run_training(
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


def _run_training(
    training: Training,
    *,
    store: CheckpointStore,
    settings: TrainerSettings,
    mailbox: Any,  # noqa: ANN401 - an actor handle
) -> _FinishedTraining:
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    check_batch_split(training.settings.global_batch, world=world, sharding=settings.sharding)
    device = next(training.model.parameters()).device
    spread = settings.sharding == "fsdp" and world > 1
    # Spread is a copy: what evaluates must run on one worker, and is given the whole network.
    model = shard(copy.deepcopy(training.model), device=device) if spread else training.model
    state = new_state(model, settings=training.settings)
    resume(state, store=store, identity=training.identity, rank=rank)
    batches = training.loader.batches(state.step, rank=rank, world=world)
    with (
        closing(batches),
        open_loggers(training, store=store, done=state.step, settings=settings, rank=rank) as logbook,
        TrainingMeter(training.name) as meter,
    ):
        train(
            state,
            objective=training.objective,
            batches=batches,
            settings=training.settings,
            micro_batch=settings.micro_batch,
            wrapped=_wrap_ddp(training, model) if world > 1 and not spread else None,
            after_step=TrainingCallback(
                training,
                state=state,
                store=store,
                settings=settings,
                rank=rank,
                world=world,
                mailbox=mailbox,
                report=ray.train.report,
                logbook=logbook,
                meter=meter,
            ),
        )
    evaluation, weights = {}, state.final_weights()
    if rank == 0:
        state.optimizer.state.clear()  # twice the model's size, which the evaluation may need
        training.model.load_state_dict(weights)
        evaluation = training.evaluate()
    return _FinishedTraining(
        step=state.step, evaluation=evaluation, environment=_environment(settings, device=device)
    )


def check_batch_split(global_batch: int, *, world: int, sharding: Sharding) -> None:
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
    found = with_retries(store.url, store.newest) if rank == 0 else None
    step = [found.step if found else None]
    if dist.is_initialized():
        dist.broadcast_object_list(step, src=0)
    if (last := step[0]) is None:
        return
    checkpoint = found or with_retries(store.url, lambda: store.load(last))
    differing = list(differences(checkpoint.values["identity"], identity))
    if differing:
        raise TrainingError(
            f"the checkpoints in {store.url} are of another training: {'; '.join(differing[:3])}; "
            "finish that one with its settings, or remove them"
        )
    state.restore(checkpoint.tensors, checkpoint.values["state"])


def _wrap_ddp(training: Training, model: nn.Module) -> nn.Module:
    on_cpu = next(model.parameters()).device.type == "cpu"
    # The search for unused parameters keeps DDP from arranging its buckets anew after the first step. Three
    # and more CPU workers add in an order that follows the buckets, and a resumed run must add in the same.
    return DistributedDataParallel(model, find_unused_parameters=on_cpu or training.leaves_out)


def _num_workers(settings: TrainerSettings) -> int | tuple[int, int]:
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
