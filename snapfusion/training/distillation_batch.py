"""Batches of step distillation, their targets read from TARGETS or computed online. Both give the same."""

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
from snapfusion.training.settings import TargetSettings
from snapfusion.training.velocity import NoisyBatch

_EPS, _INTERVAL, _GUIDANCE, _DROPPED = "target_eps", "target_interval", "target_w", "target_dropped"
"""Columns of a batch with draws: eps of the latent's shape; interval int64, w float32, dropped bool, all [B].

w are of guided rows, dropped captions of vanilla ones.
"""


@dataclass(frozen=True, kw_only=True)
class DistillationBatch(NoisyBatch):
    """Noised rows at times t of the student's grid, with the teacher's target.

    Attributes:
        interval: i of the student's grid, whose noisy end is t, int64 [B].
        w: guidance scale of teacher and student [B,1,1,1] float32 (SnapFusion Eq. 10); None if vanilla.
        x_target: the x that the student learns to predict, [B,4,h,w] float32.
    """

    interval: Tensor
    w: Tensor | None
    x_target: Tensor


class TargetSource(Protocol):
    """Provides the distillation targets of a batch."""

    def draw(self, batch: Batch, *, guided: bool, step: int) -> Batch:
        """As `snapfusion.training.row_draws.DrawingObjective.draw`, of a guided step or another."""

    def __call__(self, batch: Batch, *, guided: bool, step: int) -> DistillationBatch:
        """Return the noised rows and targets of a batch at a step, on the batch's device."""


class OnlineTargets:
    """Computes targets with the teacher during training, with fresh noise at every step.

    Args:
        teacher: runs in its own dtype; all arithmetic around it is float32.
        captions: encoder of teacher and student.
        settings: of the targets.
        seed: of all draws.
    """

    def __init__(
        self, teacher: Bundle, *, captions: CaptionEncoder, settings: TargetSettings, seed: int
    ) -> None:
        self._teacher, self._captions, self._settings, self._seed = teacher, captions, settings, seed

    def draw(self, batch: Batch, *, guided: bool, step: int) -> Batch:
        """Add noise, interval, and guidance scale or caption dropout."""
        if _EPS in batch.columns:
            return batch
        return self._draw(batch, [row_key(self._seed, row, step) for row in batch.ids], guided=guided)

    def __call__(self, batch: Batch, *, guided: bool, step: int) -> DistillationBatch:
        """Noise rows with columns latent and token_ids, and compute their targets."""
        return self._compute(self.draw(batch, guided=guided, step=step), guided=guided)

    def compute(self, batch: Batch, keys: Sequence[int], *, guided: bool) -> DistillationBatch:
        """As `__call__`, with the draws of each row given by its key."""
        return self._compute(self._draw(batch, keys, guided=guided), guided=guided)

    def _draw(self, batch: Batch, keys: Sequence[int], *, guided: bool) -> Batch:
        settings = self._settings
        draws = {
            _EPS: gaussian_batch(keys, batch["latent"].shape[1:]),
            _INTERVAL: draw_intervals(keys, student_steps=settings.student_steps),
        }
        if guided:
            draws[_GUIDANCE] = draw_guidance(keys, cfg_range=settings.cfg_range)
        elif settings.caption_dropout:
            draws[_DROPPED] = draw_caption_dropout(keys, fraction=settings.caption_dropout)
        return batch.with_columns(draws)

    def _compute(self, batch: Batch, *, guided: bool) -> DistillationBatch:
        """The targets of a batch with its draws."""
        x, schedule, settings = batch["latent"], self._teacher.schedule, self._settings
        with_draws = batch.to(x.device)
        eps, interval = with_draws[_EPS], with_draws[_INTERVAL]
        t, _ = interval_ends(interval, student_steps=settings.student_steps, schedule=schedule)
        z_t = schedule.diffuse(x=x, eps=eps, t=t)
        w = with_draws[_GUIDANCE].view(-1, 1, 1, 1) if guided else None
        c = self._captions.encode(batch["token_ids"], dropped=with_draws.columns.get(_DROPPED))
        # The teacher keeps its own dtype under the trainer's autocast, so that a target is the same bits
        # whether it is computed here or for the table.
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            x_target = teacher_target(
                self._teacher.denoiser(c, w=1.0 if w is None else w, c_null=self._captions.null),
                z_t,
                interval=interval,
                student_steps=settings.student_steps,
                k=settings.k,
                schedule=schedule,
            )
        return DistillationBatch(x=x, eps=eps, z_t=z_t, interval=interval, t=t, c=c, w=w, x_target=x_target)


class StoredTargets:
    """Reads targets from TARGETS; the noise is regenerated from its key."""

    def __init__(self, *, captions: CaptionEncoder, schedule: Schedule) -> None:
        self._captions, self._schedule = captions, schedule

    def draw(self, batch: Batch, *, guided: bool, step: int) -> Batch:
        """Add the noise."""
        if _EPS in batch.columns:
            return batch
        keys = batch["noise_key"].tolist()
        return batch.with_columns({_EPS: gaussian_batch(keys, batch["latent"].shape[1:])})

    def __call__(self, batch: Batch, *, guided: bool, step: int) -> DistillationBatch:
        """Convert rows with the columns of TARGETS, all vanilla or all guided."""
        x, t = batch["latent"], batch["t"].long()
        eps = self.draw(batch, guided=guided, step=step).to(x.device)[_EPS]
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
