"""What a training of an adapter costs: the adapter's weights, a row's arithmetic, and a row's memory."""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from snapfusion.models.activation_memory import peak_bytes, unet_pass
from snapfusion.models.architecture import Architecture
from snapfusion.models.cost import count_parameters
from snapfusion.models.unet import block_unet
from snapfusion.training.lora import adapted_modules
from snapfusion.training.settings import LoraSettings


@dataclass(frozen=True, kw_only=True)
class LoraCosts:
    """Costs of an adapter in a UNet, whose own weights are frozen (Hu et al. 2022).

    Attributes:
        parameters: of the adapter.
        gmacs: a third of the 10^9 multiply-accumulates of a forward and backward pass, because the work
            `train` counts three; frozen weights need no gradient, so that it is about two thirds of a pass.
        activations: bytes of one row, there and back, two a number.
    """

    parameters: int
    gmacs: float
    activations: int


@functools.lru_cache(maxsize=16)
def lora_costs(
    lora: LoraSettings, student: Architecture, *, tokens: int, checkpointing: bool = False
) -> LoraCosts:
    """Count the costs on shapes, for one latent; peft is not needed.

    Args:
        lora: the adapter.
        student: architecture of the UNet.
        tokens: of an encoded caption.
        checkpointing: whether activations are computed again in the backward pass, which is not counted in
            the multiply-accumulates.
    """
    with torch.device("meta"):
        unet = block_unet(student)
        adapter = _add_adapter(unet, lora)
    run = unet_pass(unet, student, tokens=tokens)
    unet.requires_grad_(requires_grad=False)
    adapter.requires_grad_(requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        run().mean().backward()
    flops = counter.get_total_flops()
    if checkpointing:
        unet.enable_gradient_checkpointing()
    unet.to(torch.bfloat16)
    return LoraCosts(
        parameters=count_parameters(adapter),
        # torch counts a multiply-accumulate as two operations.
        gmacs=flops / 2 / 3 / 1e9,
        activations=peak_bytes(
            unet, unet_pass(unet, student, tokens=tokens), trained=True, trained_part=adapter
        ),
    )


class _Adapted(nn.Module):
    """A layer with the two matrices of an adapter, in the shapes that peft gives them."""

    def __init__(self, base: nn.Linear | nn.Conv2d, *, rank: int) -> None:
        super().__init__()
        self.base = base
        self.adapter: nn.Module
        if isinstance(base, nn.Linear):
            down: nn.Module = nn.Linear(base.in_features, rank, bias=False)
            up: nn.Module = nn.Linear(rank, base.out_features, bias=False)
        else:
            window: dict[str, Any] = {name: getattr(base, name) for name in ("stride", "padding")}
            kernel: Any = base.kernel_size
            down = nn.Conv2d(base.in_channels, rank, kernel_size=kernel, bias=False, **window)
            up = nn.Conv2d(rank, base.out_channels, kernel_size=1, bias=False)
        self.adapter = nn.Sequential(down, up)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base(x) + self.adapter(x)
        return result


def _add_adapter(unet: nn.Module, lora: LoraSettings) -> nn.ModuleList:
    """Put an adapter into a UNet's layers; returns its own parts."""
    parts = nn.ModuleList()
    for name in adapted_modules(unet, lora.modules):
        base: Any = unet.get_submodule(name)
        adapted = _Adapted(base, rank=lora.rank)
        unet.set_submodule(name, adapted)
        parts.append(adapted.adapter)
    return parts
