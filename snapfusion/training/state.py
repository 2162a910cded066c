"""Everything that training resumes from: weights, the optimizer's moments, the average, the step, the curve.

No random generator's state is among it, because all randomness here is a function of the seed and the step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from snapfusion.training.ema import Ema
from snapfusion.training.fsdp import distribute_like, full_tensors, load_full_state_dict

TensorGroups = Mapping[str, Mapping[str, Tensor]]
"""Named groups of named tensors; a checkpoint keeps each group in a file of its own."""


@dataclass(frozen=True, kw_only=True)
class BestWeights:
    """The best weights so far, by a judge of the run's.

    Attributes:
        step: after which they were the model's.
        score: what the judge gave; lower is better.
        weights: by name.
    """

    step: int
    score: float
    weights: Mapping[str, Tensor]


class StateError(ValueError):
    """A saved state that belongs to another model or another optimizer."""


@dataclass(kw_only=True)
class TrainState:
    """A training in its course.

    Attributes:
        model: the bare network, not wrapped for distribution.
        optimizer: over `model`'s parameters, in their order.
        ema: the average of the weights, or None.
        step: optimizer steps done.
        curve: what the run wants to remember of its course; plain JSON values.
        carried: what the objective goes from step to step with; plain JSON values.
        watched: what the run saw of its models on the way; plain JSON values.
        best: the best of those models, or None before the first.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: Ema | None = None
    step: int = 0
    curve: list[dict[str, float]] = field(default_factory=list)
    carried: dict[str, Any] = field(default_factory=dict)
    watched: list[dict[str, Any]] = field(default_factory=list)
    best: BestWeights | None = None

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """All tensors, by group ("model", "optimizer", "ema", "best") and name, each whole.

        Where the model is spread over ranks, all call this at once, and rank 0 alone is given what is spread.
        """
        groups = {"model": full_tensors(self.model.state_dict()), "optimizer": full_tensors(self._moments())}
        if self.ema is not None:
            groups["ema"] = full_tensors(self.ema.averages)
        if self.best is not None:
            groups["best"] = dict(self.best.weights)
        return groups

    def values(self) -> dict[str, Any]:
        """What is not a tensor, as JSON values."""
        return {
            "step": self.step,
            "curve": self.curve,
            "carried": self.carried,
            "watched": self.watched,
            "best": None if self.best is None else {"step": self.best.step, "score": self.best.score},
        }

    def restore(self, tensors: TensorGroups, values: Mapping[str, Any]) -> None:
        """Continue exactly where the saved state stood.

        Raises:
            StateError: if the saved state is that of another model, optimizer or kind of average.
        """
        expected = {"model", "optimizer"} | ({"ema"} if self.ema is not None else set())
        if set(tensors) - {"best"} != expected:
            raise StateError(f"the saved state holds {sorted(tensors)}; {sorted(expected)} is needed")
        try:
            load_full_state_dict(self.model, tensors["model"])
            if self.ema is not None:
                self.ema.load(tensors["ema"])
            self._load_moments(tensors["optimizer"])
        except (RuntimeError, KeyError, ValueError) as error:
            raise StateError(f"the saved state does not fit this training: {error}") from error
        self.step = int(values["step"])
        self.curve = [dict(point) for point in values["curve"]]
        self.carried = dict(values.get("carried", {}))
        self.watched = list(values.get("watched", []))
        best = values.get("best")
        self.best = BestWeights(**best, weights=dict(tensors["best"])) if best else None

    def final_weights(self) -> dict[str, Tensor]:
        """The weights to use, each tensor whole: the average where one is kept, else the last.

        Where the model is spread over ranks, all call this at once, and rank 0 alone is given what is spread.
        """
        return full_tensors(self.ema.averages if self.ema is not None else self.model.state_dict())

    def _moments(self) -> dict[str, Tensor]:
        states = self.optimizer.state_dict()["state"]
        names = [name for name, _ in self.model.named_parameters()]
        return {
            f"{names[index]}/{key}": torch.as_tensor(value)
            for index, state in states.items()
            for key, value in state.items()
        }

    def _load_moments(self, moments: Mapping[str, Tensor]) -> None:
        parameters = dict(self.model.named_parameters())
        indices = {name: index for index, name in enumerate(parameters)}
        states: dict[int, dict[str, Tensor]] = {}
        for path, tensor in moments.items():
            name, _, key = path.rpartition("/")
            moment = (
                distribute_like(tensor, parameters[name])
                if tensor.shape == parameters[name].shape
                else tensor
            )
            states.setdefault(indices[name], {})[key] = moment
        # The hyperparameters are settings, not state: those of this run hold.
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": states, "param_groups": groups})
