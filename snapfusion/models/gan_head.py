"""The head that tells real latents from generated ones by what the middle of a UNet makes of them."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from snapfusion.models.snapfusion_unet_v1 import BlockUNet
from snapfusion.models.unet import architecture_of


class GanHead(nn.Module):
    """Convolutions from the middle's features to one number: D of Eq. 4 of DMD2 (Yin et al. 2024).

    Features of 1280 x 8 x 8, those of SD-v1.5 at 512 px, meet the layers of its code: 4 x 4 convolutions of
    stride 2, and then over all that is left. Features of other sides are averaged to that size in between.

    Args:
        channels: of the features.
        side: of square features.
        seed: of the initial weights, which are the same on every worker.

    Raises:
        ValueError: if `side` is below 2.
    """

    def __init__(self, channels: int, *, side: int, seed: int) -> None:
        super().__init__()
        if side < 2:
            raise ValueError(f"the UNet's middle has {side} x {side} features; the GAN needs at least 2 x 2")
        # A norm over a single number would erase it.
        groups = max(1, math.gcd(32, channels // 8))
        left = side // 2
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = nn.Sequential(
                nn.Conv2d(channels, channels, kernel_size=4, stride=2, padding=1),
                nn.GroupNorm(groups, channels),
                nn.SiLU(),
                nn.AdaptiveAvgPool2d(left),
                nn.Conv2d(channels, channels, kernel_size=left),
                nn.GroupNorm(groups, channels),
                nn.SiLU(),
                nn.Conv2d(channels, 1, kernel_size=1),
            )

    def forward(self, features: Tensor) -> Tensor:
        """Logits float32 [B] of features [B,C,h,w]."""
        logits: Tensor = self.layers(features).float()
        return logits.flatten()


def head_for(unet: UNet2DConditionModel | BlockUNet, *, seed: int) -> GanHead:
    """A head for the middle of a UNet, at its size of latents, in float32 on the UNet's device.

    Raises:
        ValueError: if the middle is smaller than 2 x 2.
    """
    channels, side = middle_shape(unet)
    return GanHead(channels, side=side, seed=seed).to(unet.device)


def middle_shape(unet: UNet2DConditionModel | BlockUNet) -> tuple[int, int]:
    """Channels and side of the features in the middle of a UNet, at its size of latents."""
    architecture = architecture_of(unet)
    channels = architecture.channels
    return channels[-1], architecture.sample_size // 2 ** (len(channels) - 1)


@contextmanager
def middle_features(unet: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what the middle of `unet` gives in each call within the context: [B,C,h,w].

    The call itself may go through a module that wraps `unet` for distribution.
    """
    found = list[Tensor]()

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:  # noqa: ANN401 - as torch has it
        found.append(output[0] if isinstance(output, tuple) else output)

    handle = unet.get_submodule("mid_block").register_forward_hook(keep)
    try:
        yield found
    finally:
        handle.remove()
