"""Defines a training: model, objective, loader, evaluation. `jobs.training.trainer` runs it."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from pipelines.loading.loader import PrepareBatch
from snapfusion.settings import differences
from snapfusion.training.batch import Batch
from snapfusion.training.loop import AnyObjective
from snapfusion.training.networks import MODEL
from snapfusion.training.settings import LoopSettings, NetworkSettings


class TrainingError(ValueError):
    """A training that cannot begin, resume or end with these settings and rows; the message says why."""


def first_differences(stored: Any, current: Any) -> str:  # noqa: ANN401 - JSON values
    """The first difference between a stored identity and the present one, for an error; empty if equal."""
    return "; ".join(islice(differences(stored, current), 3))


class Batches(Iterator[Batch], Protocol):
    """This worker's share of successive global batches, without end."""

    def close(self) -> None:
        """End the prefetching threads."""


class Loader(Protocol):
    """Source of batches, such as `pipelines.loading.loader.BatchLoader`."""

    def batches(
        self, start: int, *, rank: int = 0, world: int = 1, prepare: PrepareBatch | None = None
    ) -> Batches:
        """The share of `rank` in global batch `start`, `start` + 1, ..., prepared in a thread."""


@dataclass(frozen=True, kw_only=True)
class ValidationResult:
    """Result of a validation.

    Attributes:
        record: JSON values for the checkpoint and metrics.json.
        scalars: values for the loggers.
        score: criterion of the best weights, lower is better; None if there is no finite value.
        image: sample grid, uint8 [H,W,3].
    """

    record: dict[str, Any]
    scalars: dict[str, float]
    score: float | None
    image: np.ndarray


class Validation(Protocol):
    """Validates weights during training, on rank 0."""

    every: int

    def __call__(self, weights: Mapping[str, torch.Tensor]) -> ValidationResult:
        """Validate; changes neither the weights nor the state of any random generator."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """One training, as each worker assembles it for itself.

    Attributes:
        name: of its checkpoint store; a run under the same name resumes.
        model: with the same initial weights on every worker, on the worker's device.
        objective: loss, called on the model's device.
        loader: of batches.
        settings: of the training loop and of the optimizer of `model`.
        identity: JSON values that determine the result; a checkpoint of another identity is refused.
        evaluate: called on rank 0 with the final weights in `model`; returns JSON values.
        validation: called on rank 0 with the current weights, averaged if an average is kept; None for none.
        skips_blocks: whether a step may leave parts of the model without a gradient.
        others: networks that are trained beside `model`, with the settings of their optimizers, by name;
            likewise the same on every worker.
    """

    name: str
    model: nn.Module
    objective: AnyObjective
    loader: Loader
    settings: LoopSettings
    identity: dict[str, Any]
    evaluate: Callable[[], dict[str, Any]] = field(default=dict)
    validation: Validation | None = None
    skips_blocks: bool = False
    others: Mapping[str, tuple[nn.Module, NetworkSettings]] = field(default_factory=dict)

    @property
    def networks(self) -> dict[str, nn.Module]:
        """All networks that are trained, by name."""
        return {MODEL: self.model, **{name: model for name, (model, _) in self.others.items()}}


TrainingFactory = Callable[..., Iterable[Training]]
"""Assembles trainings, which run one after the other, for the torch device given as `device`.

Called in each worker, so it must be importable there.
"""
