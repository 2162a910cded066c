"""The features that FID is measured in: Inception v3 as it was first published for it. SnapFusion Sec. 5.

Its weights are those of "pt_inception-2015-12-05", saved as safetensors under the same names; the network
differs from torchvision's own in its classes and in the pools of nine blocks. A FID depends on the resize
kernel too, so the kernel is a choice that is recorded with every number.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import Inception3
from torchvision.models.inception import InceptionA, InceptionC, InceptionE

from snapfusion.metrics.settings import SIDE, Resize


class Inception(nn.Module):
    """images uint8 [B,3,H,W] -> 2048 features."""

    def __init__(self, *, resize: Resize = "bicubic") -> None:
        super().__init__()
        self.resize: Resize = resize
        network = Inception3(num_classes=1008, aux_logits=False, init_weights=False)
        network.Mixed_5b = _BlockA(192, pool_features=32)
        network.Mixed_5c = _BlockA(256, pool_features=64)
        network.Mixed_5d = _BlockA(288, pool_features=64)
        network.Mixed_6b = _BlockC(768, channels_7x7=128)
        network.Mixed_6c = _BlockC(768, channels_7x7=160)
        network.Mixed_6d = _BlockC(768, channels_7x7=160)
        network.Mixed_6e = _BlockC(768, channels_7x7=192)
        network.Mixed_7b = _BlockE(1280)
        network.Mixed_7c = _LastBlock(2048)
        network.fc = nn.Identity()
        self.network = network.eval()

    def prepare(self, images: Tensor) -> Tensor:
        """The network's input float32 [B,3,299,299] in [-1, 1] of images uint8 [B,3,H,W].

        Raises:
            ValueError: unless the images are uint8 [B,3,H,W].
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images are {images.dtype} {tuple(images.shape)}; uint8 [B,3,H,W] is accepted")
        pixels = images.float() / 255.0
        side = (SIDE, SIDE)
        if self.resize == "bicubic":
            pixels = functional.interpolate(pixels, size=side, mode="bicubic", antialias=True).clamp(0.0, 1.0)
        else:
            pixels = functional.interpolate(pixels, size=side, mode="bilinear", align_corners=False)
        return 2.0 * pixels - 1.0

    def forward(self, images: Tensor) -> Tensor:
        """float32 [B,2048] of uint8 [B,3,H,W]."""
        features: Tensor = self.network(self.prepare(images))
        return features


def load_inception(weights: Path, *, resize: Resize = "bicubic") -> Inception:
    """The network with weights from a file of safetensors.

    Raises:
        ValueError: if the file is not one, or lacks or adds tensors.
    """
    if weights.suffix != ".safetensors" or not weights.is_file():
        raise ValueError(f"{weights} is not a .safetensors file; pickled weights are never opened")
    inception = Inception(resize=resize)
    tensors = {name: value for name, value in load_file(weights).items() if not name.startswith("fc.")}
    try:
        inception.network.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(
            f"{weights} does not hold this Inception: {str(error).splitlines()[1].strip()}"
        ) from None
    inception.requires_grad_(requires_grad=False)
    return inception


class _UnpaddedAverage:
    """A block whose average pool counts pixels alone, and not the zeros round the picture."""

    def _forward(self, x: Tensor) -> list[Tensor]:
        pooled = functional.avg_pool2d(x, kernel_size=3, stride=1, padding=1, count_include_pad=False)
        return [*super()._forward(x)[:-1], self.branch_pool(pooled)]  # type: ignore[misc, attr-defined]


class _BlockA(_UnpaddedAverage, InceptionA):
    pass


class _BlockC(_UnpaddedAverage, InceptionC):
    pass


class _BlockE(_UnpaddedAverage, InceptionE):
    pass


class _LastBlock(InceptionE):
    """The last block pools by the maximum: a quirk of the published network that its numbers depend on."""

    def _forward(self, x: Tensor) -> list[Tensor]:
        pooled = functional.max_pool2d(x, kernel_size=3, stride=1, padding=1)
        return [*super()._forward(x)[:-1], self.branch_pool(pooled)]
