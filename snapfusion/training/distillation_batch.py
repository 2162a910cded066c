"""What a student is taught by a batch: read from TARGETS, or asked of the teacher now. Both give the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from snapfusion.distill import teacher_target
from snapfusion.models.bundle import Bundle
from snapfusion.noise import gaussian_batch
from snapfusion.schedule import Schedule
from snapfusion.training.batch import Batch
from snapfusion.training.captions import CaptionEncoder, draw_caption_dropout
from snapfusion.training.draws import draw_guidance, draw_intervals, interval_ends, row_key
from snapfusion.training.settings import CfgRange


@dataclass(frozen=True, kw_only=True)
class DistillationBatch:
    """Rows on the student's grid, and what the student should find there.

    Attributes:
        x: clean latents [B,4,h,w] float32.
        eps: their noise, of the same form.
        z_t: where the student stands, of the same form.
        interval: i of its grid, int64 [B].
        t: the interval's noisy end, int64 [B].
        c: its condition [B,L,D] float32.
        w: guidance of teacher and student [B,1,1,1] float32 (SnapFusion Eq. 10); None where vanilla.
        x_target: [B,4,h,w] float32.
    """

    x: Tensor
    eps: Tensor
    z_t: Tensor
    interval: Tensor
    t: Tensor
    c: Tensor
    w: Tensor | None
    x_target: Tensor


class TargetSource(Protocol):
    """Where lessons come from."""

    def __call__(self, batch: Batch, *, guided: bool, step: int) -> DistillationBatch:
        """The lesson of a batch at a step, on the batch's device."""
        ...


class OnlineTargets:
    """The teacher in the trainer: rows of LATENTS, each with fresh noise at every step.

    Args:
        teacher: which runs in the dtype it holds; all arithmetic round it is float32.
        captions: of teacher and student alike.
        student_steps: N_S.
        k: the teacher's steps for one of the student's.
        cfg_range: of w in guided steps.
        caption_dropout: fraction of rows that go without their caption in vanilla steps.
        seed: of all draws.
    """

    def __init__(
        self,
        teacher: Bundle,
        *,
        captions: CaptionEncoder,
        student_steps: int,
        k: int,
        cfg_range: CfgRange,
        caption_dropout: float,
        seed: int,
    ) -> None:
        self._teacher, self._captions = teacher, captions
        self._student_steps, self._k, self._cfg_range = student_steps, k, cfg_range
        self._caption_dropout, self._seed = caption_dropout, seed

    def __call__(self, batch: Batch, *, guided: bool, step: int) -> DistillationBatch:
        """The lesson of rows with columns latent and token_ids."""
        return self.teach(batch, [row_key(self._seed, row, step) for row in batch.ids], guided=guided)

    def teach(self, batch: Batch, keys: Sequence[int], *, guided: bool) -> DistillationBatch:
        """The lesson whose draws follow from `keys`, one a row."""
        x, schedule = batch["latent"], self._teacher.schedule
        eps = gaussian_batch(keys, x.shape[1:]).to(x.device)
        interval = draw_intervals(keys, student_steps=self._student_steps).to(x.device)
        t, _ = interval_ends(interval, student_steps=self._student_steps, schedule=schedule)
        z_t = schedule.diffuse(x=x, eps=eps, t=t)
        dropped, w = None, None
        if guided:
            w = draw_guidance(keys, cfg_range=self._cfg_range).view(-1, 1, 1, 1).to(x.device)
        elif self._caption_dropout:
            dropped = draw_caption_dropout(keys, fraction=self._caption_dropout).to(x.device)
        c = self._captions.encode(batch["token_ids"], dropped=dropped)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            x_target = teacher_target(
                self._teacher.denoiser(c, w=1.0 if w is None else w, c_null=self._captions.null),
                z_t,
                interval=interval,
                student_steps=self._student_steps,
                k=self._k,
                schedule=schedule,
            )
        return DistillationBatch(x=x, eps=eps, z_t=z_t, interval=interval, t=t, c=c, w=w, x_target=x_target)


class StoredTargets:
    """Rows of TARGETS as they were computed; the noise is made anew from its key."""

    def __init__(self, *, captions: CaptionEncoder, schedule: Schedule) -> None:
        self._captions, self._schedule = captions, schedule

    def __call__(self, batch: Batch, *, guided: bool, step: int) -> DistillationBatch:
        """The lesson of rows with the columns of TARGETS, all vanilla or all guided."""
        x, t = batch["latent"], batch["t"].long()
        eps = gaussian_batch(batch["noise_key"].tolist(), x.shape[1:]).to(x.device)
        return DistillationBatch(
            x=x,
            eps=eps,
            z_t=self._schedule.diffuse(x=x, eps=eps, t=t),
            interval=batch["interval"].long(),
            t=t,
            c=self._captions.encode(batch["token_ids"]),
            w=batch["w"].float().view(-1, 1, 1, 1) if guided else None,
            x_target=batch["x_target"],
        )
