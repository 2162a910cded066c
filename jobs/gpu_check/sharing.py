"""Trains by several processes, sharded or replicated, beside one process alone."""

import itertools
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from jobs.gpu_check.settings import CheckSize, PartSkipped
from jobs.planning.timings import noise_batch
from snapfusion.models.bundle import Bundle
from snapfusion.models.load import load
from snapfusion.training.batch import Batch
from snapfusion.training.captions import CaptionEncoder
from snapfusion.training.fsdp import shard
from snapfusion.training.loop import StepResult, new_state, train
from snapfusion.training.networks import MODEL
from snapfusion.training.settings import LoopSettings, VelocitySettings
from snapfusion.training.velocity import VelocityObjective

_STEPS = 3
_ROWS = 2
"""Of each worker, one a pass: of SD-v1.5 in float32 more would not fit into 24 GiB."""
_CAPTION = "a picture of something"


def measure_fsdp(size: CheckSize, folder: Path) -> dict[str, Any]:
    """Sharded over all devices, of the CPU over two processes."""
    return _measure(size, folder, sharding="fsdp", world=2 if size.device == "cpu" else _devices())


def measure_nccl(size: CheckSize, folder: Path) -> dict[str, Any]:
    """Replicated over two devices, by nccl; of the CPU over two processes, by gloo."""
    if size.device == "cuda" and _devices() < 2:
        raise PartSkipped("nccl needs two CUDA devices, and there is one")
    return _measure(size, folder, sharding="none", world=2)


def _devices() -> int:
    return torch.cuda.device_count()


def _measure(
    size: CheckSize, folder: Path, *, sharding: Literal["fsdp", "none"], world: int
) -> dict[str, Any]:
    backend = "nccl" if size.device == "cuda" else "gloo"
    with tempfile.TemporaryDirectory(dir=folder) as meeting:
        alone, shared = (Path(meeting) / name for name in ("alone.json", "shared.json"))
        # In processes of their own, as each needs the device's memory.
        spawn(_train_alone, (size, world, alone))
        spawn(_train_shared, (size, sharding, backend, world, shared), nprocs=world)
        one, several = (json.loads(path.read_text()) for path in (alone, shared))
    differences = [abs(a / b - 1.0) for a, b in zip(several["losses"], one["losses"], strict=True)]
    return {
        "backend": backend,
        "workers": world,
        "sharding": sharding,
        "largest_relative_difference": max(differences),
        "ms": several["ms"],
        "ms_alone": one["ms"],
        "peak_mb": several["peak_mb"],
        "peak_mb_alone": one["peak_mb"],
    }


def _train_alone(rank: int, size: CheckSize, world: int, result: Path) -> None:
    """Train in one process on whole batches."""
    del rank
    torch.set_num_threads(1)
    bundle, unet = _loaded(size, device=torch.device(size.device))
    _write(result, _trained(unet, bundle, world=world))


def _train_shared(rank: int, size: CheckSize, sharding: str, backend: str, world: int, result: Path) -> None:
    """Train in one of the processes on its share."""
    torch.set_num_threads(1)
    device = torch.device(size.device, rank) if size.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    meeting = f"file://{result}.meeting"
    dist.init_process_group(backend, init_method=meeting, rank=rank, world_size=world)
    bundle, unet = _loaded(size, device=device)
    if sharding == "fsdp":
        found = _trained(shard(unet, device=device), bundle, world=world, rank=rank)
    else:
        wrapped = DistributedDataParallel(unet, find_unused_parameters=device.type == "cpu")
        found = _trained(unet, bundle, world=world, rank=rank, wrapped=wrapped)
    if rank == 0:
        _write(result, found)
    dist.destroy_process_group()


def _loaded(size: CheckSize, *, device: torch.device) -> tuple[Bundle, nn.Module]:
    """The model, and its UNet to be trained."""
    bundle = load(size.model, device=str(device))
    bundle.unet.enable_gradient_checkpointing()
    return bundle, bundle.unet.requires_grad_(requires_grad=True)


def _trained(
    unet: nn.Module,
    bundle: Bundle,
    *,
    world: int,
    rank: int | None = None,
    wrapped: nn.Module | None = None,
) -> dict[str, Any]:
    """Losses of the steps, milliseconds of the last one, and peak memory; of a share, or of all rows."""
    steps = list[StepResult]()
    settings = LoopSettings(
        num_steps=_STEPS, global_batch=_ROWS * world, learning_rate=1e-4, decay="constant"
    )
    objective = VelocityObjective(
        VelocitySettings(), captions=CaptionEncoder(bundle), schedule=bundle.schedule, seed=0
    )
    train(
        new_state(unet, settings=settings),
        objective=objective,
        batches=_batches(bundle, world=world, rank=rank),
        settings=settings,
        micro_batch=1,
        wrapped=None if wrapped is None else {MODEL: wrapped},
        after_step=steps.append,
    )
    cuda = bundle.device.type == "cuda"
    return {
        "losses": [step.loss for step in steps],
        "ms": 1e3 * steps[-1].seconds,
        "peak_mb": torch.cuda.max_memory_allocated() / 1e6 if cuda else None,
    }


def _batches(bundle: Bundle, *, world: int, rank: int | None) -> Iterator[Batch]:
    """Batches that are the same in all processes, or the share of one of them."""
    torch.manual_seed(0)
    rows = _ROWS * world
    batch = noise_batch(bundle, rows, token_ids=bundle.tokenize([_CAPTION] * rows))
    shares = list(batch.split(_ROWS))
    return itertools.repeat(batch if rank is None else shares[rank])


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values))
