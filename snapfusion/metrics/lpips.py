"""LPIPS: the perceptual distance of two images by a network's features (Zhang et al. 2018), version 0.1.

Here it measures how different the images of one caption are. Each image goes through the network once,
however many pairs it is in; the public implementations take pairs, and fetch weights without a hash.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import alexnet, vgg16

from snapfusion.metrics.pinned import load_pinned
from snapfusion.metrics.settings import LpipsNetwork

_LAYERS: Final = {"alex": (1, 4, 7, 9, 11), "vgg": (3, 8, 15, 22, 29)}
"""Activations that are compared, by their index in torchvision's `features`."""
_CHANNELS: Final = {"alex": (64, 192, 384, 256, 256), "vgg": (64, 128, 256, 512, 512)}
_SMALLEST: Final = {"alex": 31, "vgg": 16}
"""Pixels a side that are left of by the pooling before the last activation."""

# Channels of images in [-1, 1] are shifted and scaled by these.
_SHIFT: Final = (-0.030, -0.088, -0.188)
_SCALE: Final = (0.458, 0.448, 0.450)
_EPSILON: Final = 1e-10
"""Added to the norms of features."""


class Lpips(nn.Module):
    """The distance, with weights that are still to be loaded.

    Attributes:
        backbone: torchvision's network, of which the convolutions are used.
        heads: weight of each channel, by layer.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, network: LpipsNetwork) -> None:
        super().__init__()
        self.network: LpipsNetwork = network
        with torch.device("meta"):  # the classifier has most of the weights, and is not used
            features = {"alex": alexnet, "vgg": vgg16}[network](weights=None).features
        self.backbone = _Backbone(features.to_empty(device="cpu"))
        self.heads = _Heads(_CHANNELS[network])
        self.register_buffer("shift", torch.tensor(_SHIFT).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(_SCALE).view(1, 3, 1, 1))

    @torch.inference_mode()
    def pairwise(self, images: Tensor) -> Tensor:
        """The distance of every two images, float32 [B(B-1)/2] in order of `itertools.combinations`.

        Args:
            images: uint8 [B,3,H,W] of one size.

        Raises:
            ValueError: for images of another type, or smaller than the network reads.
        """
        pairs = list(combinations(range(len(images)), 2))
        distances = images.new_zeros(len(pairs), dtype=torch.float32)
        for features, weights in zip(self._features(images), self.heads.weights(), strict=True):
            for index, (a, b) in enumerate(pairs):
                squares = (features[a] - features[b]).square_()
                distances[index] += torch.einsum("chw,c->hw", squares, weights).mean()
        return distances

    def _features(self, images: Tensor) -> Iterator[Tensor]:
        """Features [B,C,h,w] of each compared layer, of length 1 at every position."""
        self._check(images)
        x = (2.0 * (images.float() / 255.0) - 1.0 - self.shift) / self.scale
        layers = _LAYERS[self.network]
        for index, layer in enumerate(self.backbone.features[: layers[-1] + 1]):
            x = layer(x)
            if index in layers:
                yield x / (x.square().sum(dim=1, keepdim=True).sqrt() + _EPSILON)

    def _check(self, images: Tensor) -> None:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images are {images.dtype} {tuple(images.shape)}; uint8 [B,3,H,W] is accepted")
        if min(images.shape[2:]) < (least := _SMALLEST[self.network]):
            raise ValueError(
                f"images are {tuple(images.shape[2:])} pixels; LPIPS by {self.network!r} needs {least} a side"
            )


class _Backbone(nn.Module):
    """The convolutions, under the names of torchvision's file: features.0.weight, ..."""

    def __init__(self, features: nn.Sequential) -> None:
        super().__init__()
        self.features = features


class _Heads(nn.Module):
    """The weights of channels, under the names of their published file: lin0.model.1.weight, ..."""

    def __init__(self, channels: tuple[int, ...]) -> None:
        super().__init__()
        for number, count in enumerate(channels):
            # The published heads have a dropout before the convolution.
            head = nn.Sequential(nn.Identity(), nn.Conv2d(count, 1, kernel_size=1, bias=False))
            self.add_module(f"lin{number}", nn.ModuleDict({"model": head}))

    def weights(self) -> Iterator[Tensor]:
        """Each layer's weights [C]."""
        return (parameter.flatten() for parameter in self.parameters())


def lpips_gmacs(network: LpipsNetwork, *, side: int) -> float:
    """10^9 multiply-accumulates of the backbone for one image of `side` pixels a side."""
    image = torch.empty(1, 3, side, side, dtype=torch.uint8, device="meta")
    with FlopCounterMode(display=False) as counter:
        Lpips(network).to("meta").pairwise(image)
    return counter.get_total_flops() / 2e9


def load_lpips(network: LpipsNetwork, *, backbone: Path, heads: Path) -> Lpips:
    """The distance with weights from files of safetensors.

    Args:
        network: backbone.
        backbone: torchvision's weights of it, trained on ImageNet.
        heads: the weights of channels, as the authors published them.

    Raises:
        ValueError: if a file is in another format, damaged, or of another network.
    """
    lpips = Lpips(network)
    load_pinned(lpips.backbone, backbone, name=f"torchvision's {network}", unused=r"classifier\..+")
    load_pinned(lpips.heads, heads, name=f"the heads of LPIPS for {network!r}")
    return lpips
