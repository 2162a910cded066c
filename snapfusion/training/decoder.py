"""The decoder's objective: mean squared error to the teacher's image. SnapFusion Sec. 3.2."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from snapfusion.training.batch import Batch

TeacherImages = Callable[[Batch], Tensor]
"""Returns the teacher's images of a batch of latents, float32 [B,3,H,W] in -1 .. 1."""


def stored_images(batch: Batch) -> Tensor:
    """Return the images stored with the pairs: column "image", uint8 [B,3,H,W]."""
    return batch["image"].float() / 127.5 - 1.0


def decoded_images(decode: Callable[[Tensor], Tensor]) -> TeacherImages:
    """Decode column "latent" [B,4,h,w] with the teacher during training.

    Args:
        decode: scaled latent [B,4,h,w] -> image float32 [B,3,H,W] in -1 .. 1.
    """

    def images(batch: Batch) -> Tensor:
        with torch.no_grad(), torch.autocast(batch["latent"].device.type, enabled=False):
            return decode(batch["latent"])

    return images


class DecoderObjective:
    """Mean squared error between student and teacher images in -1 .. 1, per row, float32."""

    def __init__(self, teacher_images: TeacherImages) -> None:
        self.teacher_images = teacher_images

    def __call__(self, model: nn.Module, batch: Batch, *, step: int) -> Tensor:
        """Return the error of each row, float32 [B]; `model` maps a scaled latent [B,4,h,w] to an image."""
        # The student's image is not clamped: clamping would cut the gradient where it overshoots.
        student: Tensor = model(batch["latent"])
        return (student.float() - self.teacher_images(batch)).square().mean(dim=(1, 2, 3))
