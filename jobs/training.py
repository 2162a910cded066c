"""What a training is: what is trained, on what, by which workers. `jobs.trainer` runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationInfo, field_validator
from torch import nn

from jobs.logbook import Kind
from snapfusion.settings import Settings
from snapfusion.training.batch import Batch
from snapfusion.training.loop import LoopSettings, Objective

Sharding = Literal["none", "fsdp"]


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
