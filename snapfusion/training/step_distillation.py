"""Step distillation: vanilla, CFG-aware or mixed, and the original loss beside it. SnapFusion Eq. 11."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from snapfusion.losses import combined_loss, distillation_loss, distillation_weight, velocity_loss
from snapfusion.noise import noise_key, uniform
from snapfusion.sampling import guide, time_grid
from snapfusion.schedule import Schedule
from snapfusion.training.batch import Batch
from snapfusion.training.captions import CaptionEncoder
from snapfusion.training.distillation_batch import DistillationBatch, TargetSource
from snapfusion.training.moving_averages import MovingAverages
from snapfusion.training.settings import StepDistillationSettings
from snapfusion.training.velocity import NoiseSampler, predict_velocity

BRANCHES: Final = {False: "vanilla", True: "guided"}
_QUANTITIES = ("loss", "error", "grad_norm", "original")


def is_guided_step(seed: int, step: int, p: float) -> bool:
    """Whether step `step` is guided: with probability p, for all ranks and rows alike. SnapFusion Eq. 11."""
    return bool(uniform(noise_key("branch", seed, step), 1)[0] < p)


@dataclass(frozen=True, kw_only=True)
class _StudentOutput:
    """What the student said: v of the lesson, guided where that is; and its L_ori, float32 [B], if any."""

    v: Tensor
    original: Tensor | None
    original_interval: Tensor


class StepDistillationObjective:
    """L = L_dstl + gamma L_ori of each row. `model` is the student's UNet, which predicts v.

    It goes from step to step with the moving averages of its losses: of both branches, and by the interval
    of the student's grid.

    Args:
        settings: of the losses.
        lessons: what is taught.
        captions: of teacher and student alike.
        schedule: of teacher and student.
        seed: of all draws.
        across_ranks: whether the averages are those of all ranks; if not, one rank may call by itself.
    """

    def __init__(
        self,
        settings: StepDistillationSettings,
        *,
        lessons: TargetSource,
        captions: CaptionEncoder,
        schedule: Schedule,
        seed: int,
        across_ranks: bool = True,
    ) -> None:
        self._settings, self._lessons, self._captions = settings, lessons, captions
        self._schedule, self._seed = schedule, seed
        self._originals = NoiseSampler(
            captions=captions, schedule=schedule, seed=seed, caption_dropout=settings.caption_dropout
        )
        self._means = MovingAverages(
            [f"{branch}/{quantity}" for branch in BRANCHES.values() for quantity in _QUANTITIES],
            parts=settings.student_steps,
            decay=settings.ratio_decay,
            across_ranks=across_ranks,
        )

    def guided(self, step: int) -> bool:
        """Whether a step takes the guided branch."""
        return is_guided_step(self._seed, step, self._settings.cfg_probability)

    def gamma(self, *, guided: bool) -> float:
        """The weight of L_ori in the present step of a branch."""
        if self._settings.gamma_rule == "constant":
            return self._settings.gamma
        ratio = self._ratio(BRANCHES[guided])
        return self._settings.gamma * ratio if ratio is not None else 0.0

    def __call__(self, model: nn.Module, batch: Batch, *, step: int) -> Tensor:
        """The loss of each row, float32 [B]. One forward pass holds all that the student is asked."""
        guided = self.guided(step)
        lesson = self._lessons(batch, guided=guided, step=step)
        asked = self._ask(model, lesson, batch, step=step)
        loss = self._distillation(lesson, asked)
        original = asked.original
        if original is None:
            return loss
        self._means.add(f"{BRANCHES[guided]}/original", original, part=asked.original_interval)
        return combined_loss(distillation=loss, original=original, gamma=self.gamma(guided=guided))

    def end_step(self) -> dict[str, float]:
        """Move the averages on; called on all ranks. Figures of the course of training so far.

        `branch/loss`, `branch/original`, their `branch/ratio` and `branch/gamma`; and, of each interval i of
        the grid, `branch/loss/i` (Eq. 9), `branch/error/i` (of x, without the weight), `branch/grad_norm/i`
        (of a row's distillation loss, by what the network put out) and `branch/ratio/i`.
        """
        self._means.end_step()
        return {name: value for name, value in self._figures().items() if value is not None}

    def values(self) -> dict[str, Any]:
        """What the next step needs of those before it, as JSON values."""
        return self._means.values()

    def restore(self, values: Mapping[str, Any]) -> None:
        """Go on from what `values` gave."""
        self._means.restore(values)

    def _ask(self, model: nn.Module, lesson: DistillationBatch, batch: Batch, *, step: int) -> _StudentOutput:
        """All passes of a step as one batch, the gradient through each: of a guided student, both."""
        settings, schedule = self._settings, self._schedule
        on_grid = settings.original_times == "grid"
        rows = None if settings.gamma == 0.0 or on_grid else self._originals(batch, step=step)
        guided = lesson.w is not None and not settings.w_conditioned
        passes = [(lesson.z_t, lesson.t, lesson.c)]
        if guided:
            passes.append((lesson.z_t, lesson.t, self._captions.null.expand_as(lesson.c)))
        if rows is not None:
            passes.append((rows.z_t, rows.t, rows.c))
        z, t, c = (torch.cat(columns) for columns in zip(*passes, strict=True))
        said = predict_velocity(model, z, t, c, w=self._told(lesson, rows=len(z))).split(len(batch))
        v = guide(cond=said[0], uncond=said[1], w=lesson.w) if guided and lesson.w is not None else said[0]
        if settings.gamma == 0.0:
            return _StudentOutput(v=v, original=None, original_interval=lesson.interval)
        if rows is None:
            original = velocity_loss(said[0], x=lesson.x, eps=lesson.eps, t=lesson.t, schedule=schedule)
            return _StudentOutput(v=v, original=original, original_interval=lesson.interval)
        original = velocity_loss(said[-1], x=rows.x, eps=rows.eps, t=rows.t, schedule=schedule)
        return _StudentOutput(v=v, original=original, original_interval=self._interval_at(rows.t))

    def _told(self, lesson: DistillationBatch, *, rows: int) -> Tensor | None:
        """What a w-conditioned student is told of each row: its w, and 1 in L_ori. float32 [rows]."""
        if not self._settings.w_conditioned:
            return None
        w = torch.ones(rows, device=lesson.x.device)
        if lesson.w is not None:
            w[: len(lesson.w)] = lesson.w.flatten()
        return w

    def _distillation(self, lesson: DistillationBatch, asked: _StudentOutput) -> Tensor:
        """L_dstl of each row, which is also counted in."""
        schedule, t = self._schedule, lesson.t
        x_hat = schedule.from_v(v=asked.v, z_t=lesson.z_t, t=t).x
        loss = distillation_loss(x_hat, x_target=lesson.x_target, t=t, schedule=schedule)
        weight = distillation_weight(t, schedule=schedule)
        error = loss.detach() / weight
        # x = alpha z_t - sigma v, of a mean over n elements; v = w v_cond - (w - 1) v_uncond.
        slope = 2.0 * weight * (error / x_hat[0].numel()).sqrt() * schedule.sigma(t).flatten()
        if lesson.w is not None and not self._settings.w_conditioned:
            w = lesson.w.flatten()
            slope = slope * (w**2 + (w - 1.0) ** 2).sqrt()
        branch = BRANCHES[lesson.w is not None]
        for quantity, values in (("loss", loss), ("error", error), ("grad_norm", slope)):
            self._means.add(f"{branch}/{quantity}", values, part=lesson.interval)
        return loss

    def _interval_at(self, t: Tensor) -> Tensor:
        """The interval of the student's grid that each time lies in, its noisy end included: int64 [B]."""
        times = time_grid(self._settings.student_steps, schedule_steps=self._schedule.num_steps)
        starts = torch.tensor(times[:-1], device=t.device)
        return (starts >= t.view(-1, 1)).sum(dim=1) - 1

    def _ratio(self, branch: str, part: int | None = None) -> float | None:
        """L_dstl / L_ori, or None where either is not known, or L_ori is zero."""
        loss, original = (self._mean(f"{branch}/{name}", part) for name in ("loss", "original"))
        return loss / original if loss is not None and original else None

    def _mean(self, name: str, part: int | None) -> float | None:
        return self._means.whole(name) if part is None else self._means.of_part(name, part)

    def _figures(self) -> dict[str, float | None]:
        figures: dict[str, float | None] = {}
        for guided, branch in BRANCHES.items():
            figures[f"{branch}/loss"] = self._mean(f"{branch}/loss", None)
            if figures[f"{branch}/loss"] is None:
                continue
            figures[f"{branch}/original"] = self._mean(f"{branch}/original", None)
            figures[f"{branch}/ratio"] = self._ratio(branch)
            figures[f"{branch}/gamma"] = self.gamma(guided=guided)
            for part in range(self._settings.student_steps):
                for quantity in ("loss", "error", "grad_norm"):
                    figures[f"{branch}/{quantity}/{part}"] = self._mean(f"{branch}/{quantity}", part)
                figures[f"{branch}/ratio/{part}"] = self._ratio(branch, part)
        return figures
