"""Latent consistency distillation: w-conditioned, with averaged weights as its target (Luo et al. 2023)."""

import torch
from torch import Tensor, nn

from snapfusion.consistency import consistency_function, solver_step
from snapfusion.losses import pseudo_huber_loss
from snapfusion.schedule import Schedule
from snapfusion.training.batch import Batch
from snapfusion.training.distillation_batch import DistillationBatch, TargetSource
from snapfusion.training.draws import interval_ends
from snapfusion.training.networks import MODEL, Networks
from snapfusion.training.settings import LcmSettings
from snapfusion.training.velocity import predict_velocity


class LcmObjective:
    """d(f_theta(z_t, w, c, t), f_theta-(z_s, w, c, s)) of each row: Eq. 16, Alg. 1 of (Luo et al. 2023).

    z_s is the guided teacher's DDIM step from z_t through an interval of the fine grid, theta- the averaged
    weights, d the pseudo-Huber distance. The student predicts v, and w is its input unless the settings say
    otherwise.

    Args:
        settings: of the loss.
        targets: provides the teacher's x; of `settings.targets`.
        schedule: of teacher and student.
    """

    averages = (MODEL,)

    def __init__(self, settings: LcmSettings, *, targets: TargetSource, schedule: Schedule) -> None:
        self._settings, self._targets, self._schedule = settings, targets, schedule

    def turn(self, step: int) -> tuple[str, ...]:
        """The student, at each step."""
        return (MODEL,)

    def draw(self, batch: Batch, *, step: int) -> Batch:
        """As `snapfusion.training.row_draws.DrawingObjective.draw`."""
        return self._targets.draw(batch, guided=True, step=step)

    def __call__(self, networks: Networks, batch: Batch, *, step: int) -> Tensor:
        """Return the loss of each row, float32 [B]."""
        rows = self._targets(batch, guided=True, step=step)
        return self.loss(networks.trained[MODEL], rows, average=networks.averages[MODEL])

    def loss(self, model: nn.Module, rows: DistillationBatch, *, average: nn.Module) -> Tensor:
        """The loss of guided rows, float32 [B]; `average` is called without a gradient."""
        schedule, points = self._schedule, self._settings.points
        _, s = interval_ends(rows.interval, student_steps=points, schedule=schedule)
        with torch.no_grad():
            z_s = solver_step(x=rows.x_target, z_t=rows.z_t, t=rows.t, s=s, schedule=schedule)
            target = self._clean(average, z_s, s, rows)
        return pseudo_huber_loss(self._clean(model, rows.z_t, rows.t, rows), target, c=self._settings.huber_c)

    def _clean(self, model: nn.Module, z_t: Tensor, t: Tensor, rows: DistillationBatch) -> Tensor:
        """f_theta(z_t, w, c, t) of Eq. 9; at the clean end z_t, whatever the network predicts there."""
        w = rows.w.flatten() if rows.w is not None and self._settings.w_conditioned else None
        # The network knows no t = -1; its output has no weight there.
        v = predict_velocity(model, z_t, t.clamp(min=0), rows.c, w=w)
        return consistency_function(
            self._schedule.from_v(v=v, z_t=z_t, t=t).x,
            z_t=z_t,
            t=t,
            sigma_data=self._settings.sigma_data,
            timestep_scaling=self._settings.timestep_scaling,
        )
