"""The resumable state of a training: weights, optimizer moments and averages of its networks, step, curve.

It holds no random generator's state, because all randomness is a function of the seed and the step.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from snapfusion.training.ema import Ema
from snapfusion.training.networks import MODEL, TrainedNetwork

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
    """A saved state of other networks or optimizers, or a state that would not be saved."""


@dataclass(kw_only=True)
class TrainState:
    """A training in progress.

    Attributes:
        networks: by name; `MODEL` is the one that is published.
        step: optimizer steps done, of all networks.
        curve: the logged metrics; JSON values.
        objective_state: the objective's state between steps; JSON values.
        validations: the validation results so far; JSON values.
        best: the best validated weights, or None before the first validation.
    """

    networks: dict[str, TrainedNetwork]
    step: int = 0
    curve: list[dict[str, float]] = field(default_factory=list)
    objective_state: dict[str, Any] = field(default_factory=dict)
    validations: list[dict[str, Any]] = field(default_factory=list)
    best: BestWeights | None = None

    @property
    def model(self) -> nn.Module:
        """The network that is published, not wrapped for distribution."""
        return self.networks[MODEL].model

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer of `model`."""
        return self.networks[MODEL].optimizer

    @property
    def ema(self) -> Ema | None:
        """The averaged weights of `model`, or None."""
        return self.networks[MODEL].ema

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return all full tensors, by group and name.

        Groups are "model", "optimizer", "ema" and "best"; those of another network have its name before
        theirs, as in "fake_score-model". If networks are sharded, all ranks call this at once, and only rank
        0 gets the sharded tensors.
        """
        groups = {
            _group(name, group): tensors
            for name, network in self.networks.items()
            for group, tensors in network.tensors().items()
        }
        if self.best is not None:
            groups["best"] = dict(self.best.weights)
        return groups

    def values(self) -> dict[str, Any]:
        """Return everything but the tensors, as JSON values."""
        # Checkpoints of a single network have no "updates": they are those of earlier versions.
        updates = {name: network.updates for name, network in self.networks.items()}
        # "carried" and "watched" are the keys of existing checkpoints.
        return {
            **({"updates": updates} if len(updates) > 1 else {}),
            "step": self.step,
            "curve": self.curve,
            "carried": self.objective_state,
            "watched": self.validations,
            "best": None if self.best is None else {"step": self.best.step, "score": self.best.score},
        }

    def restore(self, tensors: TensorGroups, values: Mapping[str, Any]) -> None:
        """Continue from a saved state.

        Raises:
            StateError: if it belongs to other networks or optimizers, or differs in having averages.
        """
        expected = {
            _group(name, group) for name, network in self.networks.items() for group in network.groups
        }
        if set(tensors) - {"best"} != expected:
            raise StateError(f"the saved state holds {sorted(tensors)}; {sorted(expected)} is needed")
        for name, network in self.networks.items():
            try:
                network.restore({group: tensors[_group(name, group)] for group in network.groups})
            except (RuntimeError, KeyError, ValueError) as error:
                raise StateError(f"the saved state does not fit this training: {error}") from error
            network.updates = int(values["updates"][name] if "updates" in values else values["step"])
        # Checkpoints of earlier versions lack the keys that are read with a default.
        self.step = int(values["step"])
        self.curve = [dict(point) for point in values["curve"]]
        self.objective_state = dict(values.get("carried", {}))
        self.validations = list(values.get("watched", []))
        best = values.get("best")
        self.best = BestWeights(**best, weights=dict(tensors["best"])) if best else None

    def final_weights(self) -> dict[str, Tensor]:
        """Return the full weights of `model` to use (see `TrainedNetwork.final_weights`)."""
        return self.networks[MODEL].final_weights()


def _group(name: str, group: str) -> str:
    """Name of a network's group of tensors in a checkpoint."""
    return group if name == MODEL else f"{name}-{group}"
