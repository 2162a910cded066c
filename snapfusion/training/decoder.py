"""The decoder's objective: the mean squared error to the teacher's image. SnapFusion Sec. 3.2."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from snapfusion.training.batch import Batch

TeacherImages = Callable[[Batch], Tensor]
"""The teacher's images of a batch's latents, float32 [B,3,H,W] in -1 .. 1."""


def stored_images(batch: Batch) -> Tensor:
    """The images that were decoded when the pairs were made: column "image", uint8 [B,3,H,W]."""
    return batch["image"].float() / 127.5 - 1.0


def decoded_images(decode: Callable[[Tensor], Tensor]) -> TeacherImages:
    """The images that the teacher decodes now, from column "latent" [B,4,h,w].

    Args:
        decode: scaled latent [B,4,h,w] -> image float32 [B,3,H,W] in -1 .. 1, without gradients.
    """

    def images(batch: Batch) -> Tensor:
        with torch.no_grad(), torch.autocast(batch["latent"].device.type, enabled=False):
            return decode(batch["latent"])

    return images


class DecoderObjective:
    """The mean squared error between student and teacher images in -1 .. 1, over a row's pixels, float32.

    The student's image is not clamped: a gradient must reach it where it overshoots.
    """

    def __init__(self, teacher_images: TeacherImages) -> None:
        self.teacher_images = teacher_images

    def __call__(self, model: nn.Module, batch: Batch, *, step: int) -> Tensor:
        """The error of each row, float32 [B]; `model` maps a scaled latent [B,4,h,w] to an image."""
        student: Tensor = model(batch["latent"])
        return (student.float() - self.teacher_images(batch)).square().mean(dim=(1, 2, 3))
