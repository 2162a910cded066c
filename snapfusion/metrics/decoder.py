"""Fidelity and speed of a student decoder relative to its teacher. SnapFusion Sec. 3.2, B.2."""

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
"""Images span -1 .. 1; the PSNR equals that of 8-bit images with peak 255."""


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """Agreement of the student's images with the teacher's.

    Attributes:
        psnr_db: 10 log10(PEAK^2 / mean squared error), the error pooled over all rows and pixels.
        rows: number of images.
    """

    psnr_db: float
    rows: int


@dataclass(frozen=True, kw_only=True)
class DecodeTimes:
    """Median wall time per image at one batch size.

    Attributes:
        batch: latents per call.
        repeats: measurements of each decoder, taken alternately.
        teacher_ms: milliseconds per image.
        student_ms: milliseconds per image.
    """

    batch: int
    repeats: int
    teacher_ms: float
    student_ms: float

    @property
    def ratio(self) -> float:
        """Speed-up of the student."""
        return self.teacher_ms / self.student_ms


@torch.no_grad()
def fidelity(student: Decode, batches: Iterable[Batch], *, teacher_images: TeacherImages) -> Fidelity:
    """Compare on the rows of `batches`, which are on the decoders' device.

    Raises:
        ValueError: if there is no row.
    """
    squares, count, rows = 0.0, 0, 0
    for batch in batches:
        # In float64, because the sum runs over the pixels of all rows.
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
    """Time both decoders alternately on `latents` [N,4,h,w], repeated to each batch size."""
    times = []
    for size in batches:
        batch = latents.repeat(-(-size // len(latents)), 1, 1, 1)[:size]
        # Alternating exposes both to the same other load of the machine; the first round is a warm-up.
        rounds = [(_seconds(teacher, batch), _seconds(student, batch)) for _ in range(repeats + 1)][1:]
        teacher_ms, student_ms = (
            1000.0 * statistics.median(seconds) / size for seconds in zip(*rounds, strict=True)
        )
        times.append(DecodeTimes(batch=size, repeats=repeats, teacher_ms=teacher_ms, student_ms=student_ms))
    return times


def _seconds(decode: Decode, batch: Tensor) -> float:
    start = time.perf_counter()
    decode(batch)
    if batch.device.type == "cuda":
        torch.cuda.synchronize(batch.device)
    return time.perf_counter() - start
