"""Input images of metric networks."""

import torch
from torch import Tensor
from torch.nn import functional

from snapfusion.metrics.settings import Resize


def resize_images(images: Tensor, *, size: int, resize: Resize = "bicubic") -> Tensor:
    """uint8 [B,3,H,W] to float32 [B,3,size,size] in [0, 1].

    Raises:
        ValueError: unless the images are uint8 [B,3,H,W].
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images are {images.dtype} {tuple(images.shape)}; uint8 [B,3,H,W] is accepted")
    pixels = images.float() / 255.0
    if images.shape[2:] == (size, size):
        return pixels
    if resize == "bilinear":
        return functional.interpolate(pixels, size=(size, size), mode="bilinear", align_corners=False)
    # Bicubic weights are partly negative, so results may leave [0, 1].
    return functional.interpolate(pixels, size=(size, size), mode="bicubic", antialias=True).clamp(0.0, 1.0)
