"""How close a student decoder comes to its teacher, and how much faster it is. SnapFusion Sec. 3.2, B.2."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from snapfusion.training.batch import Batch
from snapfusion.training.decoder import TeacherImages

Decode = Callable[[Tensor], Tensor]
"""Scaled latent [B,4,h,w] -> image [B,3,H,W] in -1 .. 1."""

PEAK = 2.0
"""Images span -1 .. 1, so a decibel here is one of 8-bit images."""


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """The student's images against the teacher's.

    Attributes:
        psnr_db: 10 log10(PEAK^2 / mean squared error), the error pooled over all rows and pixels.
        rows: how many.
    """

    psnr_db: float
    rows: int


@dataclass(frozen=True, kw_only=True)
class DecodeTimes:
    """Wall time of one image in a batch, the median over repeats.

    Attributes:
        batch: latents decoded at a time.
        repeats: measurements of each decoder, taken in turns.
        teacher_ms: milliseconds an image.
        student_ms: milliseconds an image.
    """

    batch: int
    repeats: int
    teacher_ms: float
    student_ms: float

    @property
    def ratio(self) -> float:
        """How many times faster the student is."""
        return self.teacher_ms / self.student_ms


@torch.no_grad()
def fidelity(student: Decode, batches: Iterable[Batch], *, teacher_images: TeacherImages) -> Fidelity:
    """Compare on the rows of `batches`, which are on the decoders' device.

    Raises:
        ValueError: if there is no row.
    """
    squares, count, rows = 0.0, 0, 0
    for batch in batches:
        error = student(batch["latent"]).double() - teacher_images(batch).double()
        squares += float(error.square().sum())
        count += error.numel()
        rows += len(batch)
    if not rows:
        raise ValueError("there is no held-out row to evaluate on")
    psnr = math.inf if squares == 0.0 else 10.0 * math.log10(PEAK**2 * count / squares)
    return Fidelity(psnr_db=psnr, rows=rows)


@torch.no_grad()
def decode_times(
    *, teacher: Decode, student: Decode, latents: Tensor, batches: Sequence[int], repeats: int
) -> list[DecodeTimes]:
    """Time both decoders on `latents` [N,4,h,w], repeated to each size of batch; they take turns.

    Taking turns, both meet the same other load of the machine. The first turn of each size is not counted.
    """
    times = []
    for size in batches:
        batch = latents.repeat(-(-size // len(latents)), 1, 1, 1)[:size]
        turns = [(_seconds(teacher, batch), _seconds(student, batch)) for _ in range(repeats + 1)][1:]
        teacher_ms, student_ms = (
            1000.0 * statistics.median(column) / size for column in zip(*turns, strict=True)
        )
        times.append(DecodeTimes(batch=size, repeats=repeats, teacher_ms=teacher_ms, student_ms=student_ms))
    return times


def _seconds(decode: Decode, batch: Tensor) -> float:
    began = time.perf_counter()
    decode(batch)
    if batch.device.type == "cuda":
        torch.cuda.synchronize(batch.device)
    return time.perf_counter() - began
