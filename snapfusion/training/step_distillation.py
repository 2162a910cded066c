"""The step distillation loss: vanilla, CFG-aware or mixed, plus the original loss. SnapFusion Eq. 11."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from snapfusion.losses import combined_loss, distillation_loss, distillation_weight
from snapfusion.noise import noise_key, uniform
from snapfusion.sampling import guide, time_grid
from snapfusion.schedule import Schedule
from snapfusion.training.batch import Batch
from snapfusion.training.captions import CaptionEncoder
from snapfusion.training.distillation_batch import DistillationBatch, TargetSource
from snapfusion.training.moving_averages import MovingAverages
from snapfusion.training.settings import BRANCHES, StepDistillationSettings
from snapfusion.training.velocity import NoiseSampler, predict_velocity

_QUANTITIES = ("loss", "error", "grad_norm", "original")


def is_guided_step(seed: int, step: int, p: float) -> bool:
    """Draw whether a step is guided, with probability p, for all ranks and rows alike. SnapFusion Eq. 11."""
    return bool(uniform(noise_key("branch", seed, step), 1)[0] < p)


class StepDistillationObjective:
    """L = L_dstl + gamma L_ori of each row. `model` is the student's UNet, which predicts v.

    Its state between steps is the moving averages of its losses, per branch and per interval of the student's
    grid.

    Args:
        settings: of the losses.
        targets: provides the teacher's targets.
        captions: encoder of teacher and student.
        schedule: of teacher and student.
        seed: of all draws.
        across_ranks: whether to average the losses over all ranks; if not, a single rank may call.
    """

    def __init__(
        self,
        settings: StepDistillationSettings,
        *,
        targets: TargetSource,
        captions: CaptionEncoder,
        schedule: Schedule,
        seed: int,
        across_ranks: bool = True,
    ) -> None:
        self._settings, self._targets, self._captions = settings, targets, captions
        self._schedule, self._seed = schedule, seed
        self._add_noise = NoiseSampler(
            captions=captions, schedule=schedule, seed=seed, caption_dropout=settings.caption_dropout
        )
        self._averages = MovingAverages(
            [f"{branch}/{quantity}" for branch in BRANCHES.values() for quantity in _QUANTITIES],
            groups=settings.student_steps,
            decay=settings.ratio_decay,
            across_ranks=across_ranks,
        )

    def guided(self, step: int) -> bool:
        """Whether a step takes the guided branch."""
        return is_guided_step(self._seed, step, self._settings.cfg_probability)

    def gamma(self, *, guided: bool) -> float:
        """The weight of L_ori in the current step of a branch."""
        if self._settings.gamma_rule == "constant":
            return self._settings.gamma
        ratio = self._ratio(BRANCHES[guided])
        return self._settings.gamma * ratio if ratio is not None else 0.0

    def draw(self, batch: Batch, *, step: int) -> Batch:
        """As `snapfusion.training.row_draws.DrawingObjective.draw`."""
        batch = self._targets.draw(batch, guided=self.guided(step), step=step)
        return self._add_noise.draw(batch, step=step) if self._original_at_own_times else batch

    def __call__(self, model: nn.Module, batch: Batch, *, step: int) -> Tensor:
        """Return the loss of each row, float32 [B]."""
        guided = self.guided(step)
        rows = self._targets(batch, guided=guided, step=step)
        v, original, original_interval = self._forward(model, rows, batch, step=step)
        loss = self._distillation_loss(v, rows)
        if original is None:
            return loss
        self._averages.add(f"{BRANCHES[guided]}/original", original, group=original_interval)
        return combined_loss(distillation=loss, original=original, gamma=self.gamma(guided=guided))

    def end_step(self) -> dict[str, float]:
        """Update the averages, on all ranks, and return the metrics of training so far.

        `branch/loss`, `branch/original`, their `branch/ratio` and `branch/gamma`; and for each interval i of
        the grid `branch/loss/i` (Eq. 9), `branch/error/i` (of x, unweighted), `branch/grad_norm/i` (of a
        row's distillation loss with respect to the network output) and `branch/ratio/i`.
        """
        self._averages.end_step()
        return {name: value for name, value in self._metrics().items() if value is not None}

    def state_dict(self) -> dict[str, Any]:
        """Return the state between two steps, as JSON values."""
        return self._averages.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`."""
        self._averages.load_state_dict(state)

    def _forward(
        self, model: nn.Module, rows: DistillationBatch, batch: Batch, *, step: int
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return the student's v, guided if the rows are, its L_ori [B] if any, and the interval of L_ori."""
        settings, null = self._settings, self._captions.null
        w = None if settings.w_conditioned else rows.w
        noisy = self._add_noise(batch, step=step) if self._original_at_own_times else None
        # All passes are one batch, because DistributedDataParallel allows one forward call per step. The
        # gradient flows through each of them, so also through the unconditional half of the guidance.
        passes = [(rows.z_t, rows.t, rows.c)]
        if w is not None:
            passes.append((rows.z_t, rows.t, null.expand_as(rows.c)))
        if noisy is not None:
            passes.append((noisy.z_t, noisy.t, noisy.c))
        z, t, c = (torch.cat(columns) for columns in zip(*passes, strict=True))
        outputs = predict_velocity(model, z, t, c, w=self._w_input(rows, num_rows=len(z))).split(len(batch))
        v = outputs[0] if w is None else guide(cond=outputs[0], uncond=outputs[1], w=w)
        if noisy is not None:
            return v, noisy.loss(outputs[-1], schedule=self._schedule), self._interval_at(noisy.t)
        original = rows.loss(outputs[0], schedule=self._schedule) if settings.gamma else None
        return v, original, rows.interval

    @property
    def _original_at_own_times(self) -> bool:
        """Whether L_ori has noise and times of its own."""
        return bool(self._settings.gamma) and self._settings.original_times == "schedule"

    def _w_input(self, rows: DistillationBatch, *, num_rows: int) -> Tensor | None:
        """Return the w input of a w-conditioned student, float32 [num_rows]: 1 in the rows of L_ori."""
        if not self._settings.w_conditioned:
            return None
        w = torch.ones(num_rows, device=rows.x.device)
        if rows.w is not None:
            w[: len(rows.w)] = rows.w.flatten()
        return w

    def _distillation_loss(self, v: Tensor, rows: DistillationBatch) -> Tensor:
        """Compute L_dstl of each row, and add it to the averages."""
        schedule, t = self._schedule, rows.t
        x_hat = schedule.from_v(v=v, z_t=rows.z_t, t=t).x
        loss = distillation_loss(x_hat, x_target=rows.x_target, t=t, schedule=schedule)
        weight = distillation_weight(t, schedule=schedule)
        error = loss.detach() / weight
        # The gradient norm in closed form, to spare a backward pass: the loss is a mean over the n elements
        # of x = alpha z - sigma v, and guidance gives v = w v_cond - (w - 1) v_uncond.
        grad_norm = 2.0 * weight * (error / x_hat[0].numel()).sqrt() * schedule.sigma(t).flatten()
        if rows.w is not None and not self._settings.w_conditioned:
            w = rows.w.flatten()
            grad_norm = grad_norm * (w**2 + (w - 1.0) ** 2).sqrt()
        branch = BRANCHES[rows.w is not None]
        for quantity, values in (("loss", loss), ("error", error), ("grad_norm", grad_norm)):
            self._averages.add(f"{branch}/{quantity}", values, group=rows.interval)
        return loss

    def _interval_at(self, t: Tensor) -> Tensor:
        """Return the interval of the student's grid that contains t, noisy end included: int64 [B]."""
        times = time_grid(self._settings.student_steps, schedule_steps=self._schedule.num_steps)
        starts = torch.tensor(times[:-1]).to(t.device, non_blocking=True)
        return (starts >= t.view(-1, 1)).sum(dim=1) - 1

    def _ratio(self, branch: str, interval: int = -1) -> float | None:
        """L_dstl / L_ori, or None while either is unknown or L_ori is zero."""
        loss, original = (self._averages.get(f"{branch}/{name}", interval) for name in ("loss", "original"))
        return loss / original if loss is not None and original else None

    def _metrics(self) -> dict[str, float | None]:
        average = self._averages.get
        metrics: dict[str, float | None] = {}
        for guided, branch in BRANCHES.items():
            if average(f"{branch}/loss") is None:
                continue
            metrics[f"{branch}/loss"] = average(f"{branch}/loss")
            metrics[f"{branch}/original"] = average(f"{branch}/original")
            metrics[f"{branch}/ratio"] = self._ratio(branch)
            metrics[f"{branch}/gamma"] = self.gamma(guided=guided)
            for interval in range(self._settings.student_steps):
                for quantity in ("loss", "error", "grad_norm"):
                    metrics[f"{branch}/{quantity}/{interval}"] = average(f"{branch}/{quantity}", interval)
                metrics[f"{branch}/ratio/{interval}"] = self._ratio(branch, interval)
        return metrics
