"""Runs trainings under Ray Train; the only user of `ray.train`.

Ray starts the workers, joins them in a process group and restarts them when one dies. Training resumes from
our own checkpoint store; Ray is given metrics, never checkpoints.
"""

import json
import os
import tempfile
import uuid
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Final

import ray.train
import torch
import torch.distributed as dist
from ray import cloudpickle
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.train.v2.api.exceptions import TrainingFailedError
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from jobs.training.callback import TrainingCallback, open_loggers
from jobs.training.initial_state import initial_state
from jobs.training.loggers import check_loggers
from jobs.training.progress_channel import OnReport, progress_channel
from jobs.training.settings import TrainerSettings
from jobs.training.sharding import unshared_batch
from jobs.training.spec import Training, TrainingError, TrainingFactory, first_differences
from pipelines.loading.followed import FollowingStopped
from pipelines.ray_data.metrics import TrainingMeter
from pipelines.storage.objects import replace_object
from pipelines.storage.retry import with_retries
from snapfusion.training.checkpoint import Checkpoint, CheckpointStore
from snapfusion.training.loop import UnusableStepError, train
from snapfusion.training.row_draws import draw_rows
from snapfusion.training.state import BestWeights, StateError, TrainState

WORKER_VARIABLES: Final = {
    # The next window of rows takes the memory of the last one, which Arrow's allocator would give back to the
    # system after 10 ms, and get cleared anew.
    "MIMALLOC_PURGE_DELAY": "-1"
}
"""Environment variables of each worker."""


class TrainingFailed(RuntimeError):
    """Workers kept failing; the next run resumes from what they saved."""


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """Result of a training.

    Attributes:
        store_url: of its checkpoints.
        step: of the last one.
        evaluation: result of `Training.evaluate`.
        environment: workers, threads, device and versions.
    """

    store_url: str
    step: int
    evaluation: dict[str, Any]
    environment: dict[str, Any]

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The last checkpoint, verified, with the weights of the published network alone."""
        return CheckpointStore(self.store_url).load(self.step, only=("model", "ema", "best"))

    @property
    def curve(self) -> list[dict[str, float]]:
        """Points of step, loss, grad_norm, learning_rate and the objective's own values."""
        return list(self.checkpoint.values["state"]["curve"])

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """The final weights: the average if one was kept."""
        return self.checkpoint.tensors.get("ema", self.raw_weights)

    @property
    def raw_weights(self) -> dict[str, torch.Tensor]:
        """The last weights, not averaged."""
        return self.checkpoint.tensors["model"]

    @property
    def validations(self) -> list[dict[str, Any]]:
        """Step and record of each validation."""
        return list(self.checkpoint.values["state"]["watched"])

    @property
    def best(self) -> BestWeights | None:
        """The best weights by validation, if there are any."""
        best = self.checkpoint.values["state"]["best"]
        return BestWeights(**best, weights=self.checkpoint.tensors["best"]) if best else None


def run_trainings(
    factory: TrainingFactory,
    arguments: Mapping[str, Any],
    *,
    store_url: str,
    settings: TrainerSettings,
    on_report: OnReport,
) -> dict[str, TrainingResult]:
    """Run the trainings of `factory(**arguments, device=...)` under Ray Train, each to its end.

    Killed at any moment and called again with the same `store_url`, it resumes from the last complete
    checkpoints; on CPUs, with the same workers and threads, the final weights are bit for bit the same.

    Args:
        factory: assembles the trainings.
        arguments: of `factory`; small and picklable.
        store_url: of all checkpoints, absolute and reachable by every worker: these have another working
            directory. Logs are in `logs/<name>` below it.
        settings: of the workers.
        on_report: receives every progress report, in this process.

    Returns:
        The results by name.

    Raises:
        TrainingError: if a loss is not finite or too large, or a checkpoint is of another training. The ids
            of the rows of such a loss are saved beside the checkpoints, as `<name>.stopped.json`.
        LoggerError: if the loggers cannot be used.
        FollowingStopped: if the table that the trainings follow has no more units for them.
        TrainingFailed: if workers keep failing.
    """
    check_loggers(settings.log_to)
    if settings.min_workers is not None:
        # Right after a node is lost Ray still counts its resources, and would wait for them much longer.
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "15")
    with tempfile.TemporaryDirectory() as scratch, progress_channel(on_report) as queue:
        config = {
            # Bytes: else the controller would unpickle it, and import all that the workers need.
            "factory": cloudpickle.dumps(partial(factory, **arguments)),
            "store_url": store_url,
            "settings": settings,
            "queue": queue,
        }
        try:
            pickled: bytes = _trainer(config, settings=settings, scratch=scratch).fit().return_value  # type: ignore[attr-defined]
        except TrainingFailedError as error:
            raise TrainingFailed(f"training failed: {_cause(error)}") from None
    result: _WorkerResult = cloudpickle.loads(pickled)
    if isinstance(result, Exception):
        raise result
    return result


def _trainer(config: dict[str, Any], *, settings: TrainerSettings, scratch: str) -> TorchTrainer:
    most, fewest = settings.num_workers, settings.min_workers
    return _TrainerWithoutSigint(
        _worker_loop,  # type: ignore[arg-type] # its result is passed on, which the annotation does not know
        train_loop_config=config,
        torch_config=TorchConfig(backend="nccl" if settings.use_gpu else "gloo"),
        scaling_config=ScalingConfig(  # type: ignore[call-arg] # mypy sees the class of Train V1
            num_workers=most if fewest is None else (fewest, most),  # type: ignore[arg-type] # likewise
            elastic_resize_monitor_interval_s=settings.resize_seconds,
            use_gpu=settings.use_gpu,
            resources_per_worker={"CPU": settings.cpus_per_worker}
            | ({"GPU": 1.0} if settings.use_gpu else {}),
            label_selector=settings.labels or None,
        ),
        # Ray's own registry of checkpoints stays empty, so a folder on the driver's node will do. A new name
        # each time: only our store decides what a run resumes from.
        run_config=RunConfig(  # type: ignore[call-arg] # likewise
            name=uuid.uuid4().hex,
            storage_path=scratch,
            failure_config=FailureConfig(max_failures=settings.max_failures),
            worker_runtime_env={"env_vars": WORKER_VARIABLES},
        ),
    )


_WorkerResult = dict[str, TrainingResult] | TrainingError | FollowingStopped
"""Result of a worker: its trainings by name, or an error that a restart cannot mend."""


class _TrainerWithoutSigint(TorchTrainer):
    """Ray's trainer without its handler of Ctrl-C, which is handled by the command.

    Ray's handler would stay for the rest of the process's life and end it with exit code 0.
    """

    def _register_sigint_handler(self, controller: object) -> None:
        """Called by `fit`."""


def _worker_loop(config: dict[str, Any]) -> bytes:
    """Run all trainings, in a worker; returns their pickled results."""
    # Bytes, as in the driver: the results, too, pass through the controller.
    return cloudpickle.dumps(_run_all(config))


def _run_all(config: dict[str, Any]) -> _WorkerResult:
    settings: TrainerSettings = config["settings"]
    # Float sums depend on the number of threads, so it must be that of the run that is resumed.
    torch.set_num_threads(settings.threads_per_worker)
    finished = {}
    try:
        for training in cloudpickle.loads(config["factory"])(device=get_device()):
            store = CheckpointStore(f"{config['store_url']}/{training.name}", keep=settings.keep_checkpoints)
            finished[training.name] = _run_training(
                training, store=store, settings=settings, queue=config["queue"]
            )
    except UnusableStepError as error:
        url = f"{config['store_url']}/{training.name}.stopped.json"
        if ray.train.get_context().get_world_rank() == 0:
            record = {"step": error.step, "reason": str(error), "rows": error.rows}
            replace_object(url, json.dumps(record, indent=1).encode())
        return TrainingError(f"{error}; all their ids are in {url}")
    except (TrainingError, StateError) as error:
        # All workers found the same error. If it were raised, Ray would restart them in vain.
        return TrainingError(str(error))
    except FollowingStopped as error:
        return error
    return finished


def _run_training(
    training: Training,
    *,
    store: CheckpointStore,
    settings: TrainerSettings,
    queue: Any,  # noqa: ANN401 - an actor handle
) -> TrainingResult:
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    # As many as there are: with `min_workers` that may be fewer than the settings were checked for.
    if reason := unshared_batch(training.settings.global_batch, world=world, sharding=settings.sharding):
        raise TrainingError(reason)
    device = next(training.model.parameters()).device
    sharded = settings.sharding == "fsdp" and world > 1
    state = initial_state(training, sharded=sharded)
    resume(state, store=store, identity=training.identity, rank=rank)
    draw = partial(draw_rows, training.objective)
    batches = training.loader.batches(state.step, rank=rank, world=world, prepare=draw)
    with (
        closing(batches),
        open_loggers(training, store=store, done=state.step, settings=settings, rank=rank) as loggers,
        TrainingMeter(training.name) as meter,
    ):
        train(
            state,
            objective=training.objective,
            batches=batches,
            settings=training.settings,
            micro_batch=settings.micro_batch,
            wrapped=_wrap_ddp(training, state) if world > 1 and not sharded else None,
            after_step=TrainingCallback(
                training=training,
                state=state,
                store=store,
                settings=settings,
                rank=rank,
                world=world,
                queue=queue,
                report=ray.train.report,
                loggers=loggers,
                meter=meter,
            ),
        )
    # Gathers sharded weights, so every rank must call it.
    evaluation, weights = {}, {name: network.final_weights() for name, network in state.networks.items()}
    if rank == 0:
        # Twice the networks' size, which the evaluation may need.
        for network in state.networks.values():
            network.optimizer.state.clear()
        for name, model in training.networks.items():
            model.load_state_dict(weights[name])
        evaluation = training.evaluate()
    return TrainingResult(
        store_url=store.url,
        step=state.step,
        evaluation=evaluation,
        environment=_environment(settings, device=device),
    )


def resume(state: TrainState, *, store: CheckpointStore, identity: dict[str, Any], rank: int) -> None:
    """Resume from the newest intact checkpoint, if there is one, the same on all workers.

    Raises:
        TrainingError: if that checkpoint is of another training; names what differs.
    """
    # Rank 0 decides for all: listing the store at different moments could give different checkpoints.
    newest = with_retries(store.url, store.newest) if rank == 0 else None
    step = [newest.step if newest else None]
    if dist.is_initialized():
        dist.broadcast_object_list(step, src=0)
    if (last := step[0]) is None:
        return
    checkpoint = newest or with_retries(store.url, lambda: store.load(last))
    if differing := first_differences(checkpoint.values["identity"], identity):
        raise TrainingError(
            f"the checkpoints in {store.url} are of another training: {differing}; finish it with its own "
            "settings, or remove them"
        )
    state.restore(checkpoint.tensors, checkpoint.values["state"])


def _wrap_ddp(training: Training, state: TrainState) -> dict[str, nn.Module]:
    on_cpu = next(state.model.parameters()).device.type == "cpu"
    # The search for unused parameters keeps DDP from rebuilding its buckets after the first step. Three or
    # more CPU workers sum in an order that depends on the buckets, and a resumed run must use the same.
    return {
        name: DistributedDataParallel(network.model, find_unused_parameters=on_cpu or training.skips_blocks)
        for name, network in state.networks.items()
    }


def _environment(settings: TrainerSettings, *, device: torch.device) -> dict[str, Any]:
    accelerator = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return {
        "workers": ray.train.get_context().get_world_size(),
        "threads_per_worker": torch.get_num_threads(),
        "device": f"{device.type} {accelerator or torch.backends.cpu.get_cpu_capability()}",
        "torch": torch.__version__,
    }


def _cause(error: TrainingFailedError) -> str:
    """The first worker's error as one line."""
    # Absent if not a worker failed but the controller.
    failures = getattr(error, "worker_failures", {})
    causes = [str(failures[rank]).strip() for rank in sorted(failures)]
    return next((cause.splitlines()[-1] for cause in causes if cause), str(error).strip().splitlines()[0])
