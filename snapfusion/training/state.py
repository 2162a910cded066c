"""The resumable state of a training: weights, optimizer moments, averages, step, curve.

It holds no random generator's state, because all randomness is a function of the seed and the step.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from snapfusion.training.ema import Ema
from snapfusion.training.fsdp import distribute_like, full_tensors, load_full_state_dict

TensorGroups = Mapping[str, Mapping[str, Tensor]]
"""Named groups of named tensors; a checkpoint stores each group in its own file."""


@dataclass(frozen=True, kw_only=True)
class BestWeights:
    """The weights with the best validation score so far.

    Attributes:
        step: after which the model had them.
        score: the validation score; lower is better.
        weights: by name.
    """

    step: int
    score: float
    weights: Mapping[str, Tensor]


class StateError(ValueError):
    """A saved state of another model or another optimizer."""


@dataclass(kw_only=True)
class TrainState:
    """A training in progress.

    Attributes:
        model: the bare network, not wrapped for distribution.
        optimizer: over `model`'s parameters, in their order.
        ema: the averaged weights, or None.
        step: optimizer steps done.
        curve: the logged metrics; JSON values.
        objective_state: the objective's state between steps; JSON values.
        validations: the validation results so far; JSON values.
        best: the best validated weights, or None before the first validation.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: Ema | None = None
    step: int = 0
    curve: list[dict[str, float]] = field(default_factory=list)
    objective_state: dict[str, Any] = field(default_factory=dict)
    validations: list[dict[str, Any]] = field(default_factory=list)
    best: BestWeights | None = None

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return all full tensors, by group ("model", "optimizer", "ema", "best") and name.

        If the model is sharded, all ranks call this at once, and only rank 0 gets the sharded tensors.
        """
        groups = {"model": full_tensors(self.model.state_dict()), "optimizer": full_tensors(self._moments())}
        if self.ema is not None:
            groups["ema"] = full_tensors(self.ema.averages)
        if self.best is not None:
            groups["best"] = dict(self.best.weights)
        return groups

    def values(self) -> dict[str, Any]:
        """Return everything but the tensors, as JSON values."""
        # "carried" and "watched" are the keys of existing checkpoints.
        return {
            "step": self.step,
            "curve": self.curve,
            "carried": self.objective_state,
            "watched": self.validations,
            "best": None if self.best is None else {"step": self.best.step, "score": self.best.score},
        }

    def restore(self, tensors: TensorGroups, values: Mapping[str, Any]) -> None:
        """Continue from a saved state.

        Raises:
            StateError: if it belongs to another model or optimizer, or differs in having averages.
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
        # Checkpoints of earlier versions lack the keys that are read with a default.
        self.step = int(values["step"])
        self.curve = [dict(point) for point in values["curve"]]
        self.objective_state = dict(values.get("carried", {}))
        self.validations = list(values.get("watched", []))
        best = values.get("best")
        self.best = BestWeights(**best, weights=dict(tensors["best"])) if best else None

    def final_weights(self) -> dict[str, Tensor]:
        """Return the full weights to use: the averaged ones if there are any, else the last.

        If the model is sharded, all ranks call this at once, and only rank 0 gets the sharded tensors.
        """
        return full_tensors(self.ema.averages if self.ema is not None else self.model.state_dict())

    def _moments(self) -> dict[str, Tensor]:
        # torch numbers the parameters; saved by name, the moments do not depend on their order.
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
            is_moment = tensor.shape == parameters[name].shape  # AdamW's "step" is a scalar
            states.setdefault(indices[name], {})[key] = (
                distribute_like(tensor, parameters[name]) if is_moment else tensor
            )
        # The hyperparameters are settings, not state: those of this run apply.
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": states, "param_groups": groups})
