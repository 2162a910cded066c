"""What a training is: what is trained, on what, by which workers. `jobs.training.trainer` runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from snapfusion.training.batch import Batch
from snapfusion.training.loop import Objective
from snapfusion.training.settings import LoopSettings


class TrainingError(ValueError):
    """A training that cannot begin, go on or end with these settings and rows; the message says why."""


class Batches(Iterator[Batch], Protocol):
    """This worker's share of successive global batches, without end."""

    def close(self) -> None:
        """End the threads that read ahead."""
        ...


class Loader(Protocol):
    """What a training reads (`pipelines.loading.loader.BatchLoader`, `pipelines.loading.branches.BranchLoader`)."""

    def batches(self, start: int, *, rank: int = 0, world: int = 1) -> Batches:
        """The share of `rank` in global batch `start`, `start` + 1, ..."""
        ...


@dataclass(frozen=True, kw_only=True)
class ValidationResult:
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


class Validation(Protocol):
    """Looks at a model every so many steps, and at the last; on the first worker."""

    every: int

    def __call__(self, weights: Mapping[str, torch.Tensor]) -> ValidationResult:
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
    watch: Validation | None = None
    leaves_out: bool = False


TrainingFactory = Callable[..., Iterable[Training]]
"""Assembles trainings for the torch device it is given as `device`; called in each worker.

They run one after the other. It stands in an importable module, as workers import it.
"""
