"""An adapter of low rank (LoRA, Hu et al. 2022) in a UNet by peft: its matrices alone are trained.

A module's output W x becomes W x + alpha / rank * up (down x). `up` begins at zero, so that the adapter adds
nothing at first.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from importlib.util import find_spec
from typing import Any, Self

import torch
from torch import Tensor, nn

from snapfusion.models.lora_files import LoraWeights
from snapfusion.noise import gaussian, noise_key
from snapfusion.training.settings import LoraSettings

_ADAPTER = "default"
"""Name that peft gives an adapter."""
_DOWN, _UP, _ALPHA = "down", "up", "alpha"


class LoraError(ValueError):
    """An adapter that a UNet cannot have, or peft is not installed."""


class LoraUNet(nn.Module):
    """A UNet with an adapter: parameters and state are the adapter's, and nothing else is trained or saved.

    Args:
        unet: changed in place: its weights are frozen, and peft puts layers of its own around adapted ones.
        settings: rank, alpha and modules.
        seed: of the initial `down`.

    Raises:
        LoraError: if the UNet has no such modules, or peft is not installed.
    """

    _unet: nn.Module

    def __init__(self, unet: nn.Module, settings: LoraSettings, *, seed: int) -> None:
        super().__init__()
        names = adapted_modules(unet, settings.modules)
        alpha = float(settings.rank if settings.alpha is None else settings.alpha)
        unet.requires_grad_(requires_grad=False)
        _inject(unet, names, rank=settings.rank, alpha=alpha)
        # Not registered as a part of this module, or its weights would be saved and averaged with each step.
        object.__setattr__(self, "_unet", unet)
        self.register_buffer(_ALPHA, torch.tensor(alpha))
        for name in names:
            layer: Any = unet.get_submodule(name)
            pair = nn.ModuleDict({_DOWN: layer.lora_A[_ADAPTER], _UP: layer.lora_B[_ADAPTER]})
            _initialize(pair, key=noise_key("lora", seed, name))
            # A name of a module may hold no dot.
            self.add_module(name.replace(".", "/"), pair)

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - those of the UNet
        """The UNet's output."""
        return self._unet(*args, **kwargs)

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the UNet."""
        self._unet.train(mode)
        return super().train(mode)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy with an adapter of its own, around the same frozen weights."""
        own = {id(tensor) for tensor in self.parameters()}
        for tensor in (*self._unet.parameters(), *self._unet.buffers()):
            if id(tensor) not in own:
                memo[id(tensor)] = tensor
        copy = type(self).__new__(type(self))
        memo[id(self)] = copy
        copy.__dict__.update(deepcopy(self.__dict__, memo))
        return copy


def adapted_modules(unet: nn.Module, ends: Sequence[str]) -> list[str]:
    """Names of the linear layers and convolutions that end so, in the UNet's order.

    Raises:
        LoraError: if no name ends so; names the end.
    """
    names = [name for name, part in unet.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)]
    if unknown := [end for end in ends if not any(_ends(name, end) for name in names)]:
        raise LoraError(
            f"lora.modules names {unknown[0]!r}, with which no linear layer or convolution of the UNet ends; "
            f"it has, for example, {names[len(names) // 2]}"
        )
    return [name for name in names if any(_ends(name, end) for end in ends)]


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def check_peft() -> None:
    """Refuse to train an adapter where peft is not installed.

    Raises:
        LoraError: if it is not; the message says how to install it.
    """
    if find_spec("peft") is None:
        raise LoraError(
            "peft is not installed, by which adapters are trained; install snapfusion-ray[lora], in a "
            "checkout by pip install -c infra/constraints.txt -e '.[lora]'"
        )


def lora_weights(state: Mapping[str, Tensor]) -> LoraWeights:
    """The matrices of the state of a `LoraUNet`, or of an average of it."""
    found: dict[str, dict[str, Tensor]] = {_DOWN: {}, _UP: {}}
    for key, tensor in state.items():
        name, _, role = key.removesuffix(".weight").rpartition(".")
        if role in found:
            found[role][name.replace("/", ".")] = tensor
    return LoraWeights(alpha=float(state[_ALPHA]), down=found[_DOWN], up=found[_UP])


def is_lora_state(state: Mapping[str, Tensor]) -> bool:
    """Whether weights are those of a `LoraUNet`."""
    return _ALPHA in state


def _inject(unet: nn.Module, names: Sequence[str], *, rank: int, alpha: float) -> None:
    check_peft()
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(names))  # type: ignore[arg-type] # a float will do
    inject_adapter_in_model(config, unet, adapter_name=_ADAPTER)


@torch.no_grad()
def _initialize(pair: nn.ModuleDict, *, key: int) -> None:
    """`down` from a Gaussian that keeps the size of its input, `up` zero; the same on every worker."""
    down: Any = pair[_DOWN].weight
    down.copy_(gaussian(key, down.shape) * down[0].numel() ** -0.5)
    nn.init.zeros_(pair[_UP].weight)  # type: ignore[arg-type] # a layer's weight
