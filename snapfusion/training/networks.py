"""The networks of a training, each with its optimizer and average. A step trains some and may read all."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from snapfusion.training.ema import Ema
from snapfusion.training.fsdp import distribute_like, full_tensors, load_full_state_dict, reshard
from snapfusion.training.settings import NetworkSettings

MODEL = "model"
"""Name of the network that is published; of most trainings the only one."""


@dataclass(frozen=True, kw_only=True)
class Networks:
    """The networks of a training, as an objective sees them in a step.

    Attributes:
        trained: the networks whose turn it is, by name, wrapped for distribution. Each must be called as a
            module, once with a gradient.
        bare: every network by name, not wrapped, to be read. The weights of the others take no gradient, but
            it passes through them to their inputs; a trained one must be read without a gradient.
        averages: modules with the averaged weights, by the names that the objective asks for.
    """

    trained: Mapping[str, nn.Module]
    bare: Mapping[str, nn.Module]
    averages: Mapping[str, nn.Module]


@dataclass(kw_only=True)
class TrainedNetwork:
    """A network in training.

    Attributes:
        model: the bare network, not wrapped for distribution.
        settings: of its optimizer.
        optimizer: over `model`'s parameters, in their order.
        ema: the averaged weights, or None.
        updates: steps of this optimizer.
    """

    model: nn.Module
    settings: NetworkSettings
    optimizer: torch.optim.Optimizer
    ema: Ema | None = None
    updates: int = 0
    _trainable: list[nn.Parameter] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def require_grad(self, *, enabled: bool) -> None:
        """Set whether weights take a gradient; those that never do stay as they are."""
        for parameter in self._trainable:
            parameter.requires_grad_(enabled)

    def update(self, *, rate: float) -> None:
        """Take a step of the optimizer at a learning rate, and one of the average; drop the gradient."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)  # frees as much memory as the model takes
        self.updates += 1
        if self.ema is not None:
            self.ema.update(self.model, step=self.updates)

    def final_weights(self) -> dict[str, Tensor]:
        """Return the full weights to use: the averaged ones if there are any, else the last.

        If the model is sharded, all ranks call this at once, and only rank 0 gets the sharded tensors.
        """
        return full_tensors(self.ema.averages if self.ema is not None else self.model.state_dict())

    @property
    def groups(self) -> set[str]:
        """Names of the groups of `tensors`."""
        return {"model", "optimizer"} | ({"ema"} if self.ema is not None else set())

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return all full tensors, by group ("model", "optimizer", "ema") and name; as `final_weights`."""
        groups = {"model": full_tensors(self.model.state_dict()), "optimizer": full_tensors(self._moments())}
        if self.ema is not None:
            groups["ema"] = full_tensors(self.ema.averages)
        return groups

    def restore(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Continue from saved `tensors`.

        Raises:
            RuntimeError, KeyError, ValueError: if they are of another network or optimizer.
        """
        load_full_state_dict(self.model, tensors["model"])
        if self.ema is not None:
            self.ema.load(tensors["ema"])
        self._load_moments(tensors["optimizer"])

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


def trained_network(
    model: nn.Module, *, settings: NetworkSettings, arithmetic: int, averaged: nn.Module | None = None
) -> TrainedNetwork:
    """Create a network at its first step, with AdamW and, if the settings ask for it, an average.

    Args:
        model: the bare network; sharded already, if it is to be.
        settings: of its optimizer.
        arithmetic: of `LoopSettings`.
        averaged: a copy of `model`, sharded likewise, that is to hold the average; None if no objective reads
            it.

    Raises:
        ValueError: if `averaged` is given and the settings have no `ema_decay`.
    """
    fused = arithmetic > 1
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=fused
    )
    ema = None
    if settings.ema_decay is not None:
        ema = Ema(model, decay=settings.ema_decay, of_run=fused, module=averaged)
    elif averaged is not None:
        raise ValueError("ema_decay is null, and the objective reads averaged weights: set it")
    return TrainedNetwork(model=model, settings=settings, optimizer=optimizer, ema=ema)


@contextmanager
def read_only(networks: Iterable[TrainedNetwork], *, averages: Iterable[nn.Module]) -> Iterator[None]:
    """Within the context the weights of `networks` take no gradient; after it, none is left gathered."""
    networks = list(networks)
    for network in networks:
        network.require_grad(enabled=False)
    try:
        yield
    finally:
        for network in networks:
            network.require_grad(enabled=True)
            reshard(network.model)
        for module in averages:
            reshard(module)
