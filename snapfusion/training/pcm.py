"""Phased consistency distillation: each phase of the trajectory has its own end (Wang et al. 2024)."""

import torch
from torch import Tensor, nn

from snapfusion.consistency import phase_ends, phase_function, solver_step
from snapfusion.losses import pseudo_huber_loss
from snapfusion.schedule import Schedule
from snapfusion.training.batch import Batch
from snapfusion.training.distillation_batch import DistillationBatch, TargetSource
from snapfusion.training.draws import interval_ends
from snapfusion.training.settings import PcmSettings
from snapfusion.training.velocity import predict_velocity


class PcmObjective:
    """d(f^m_theta(z_t, t), f^m_theta-(z_s, s)) of each row: Eq. 5 of (Wang et al. 2024) with lambda = 1.

    f^m is the student's DDIM step (Eq. 3) to s_m, the end of the phase that t lies in; z_s is the teacher's
    DDIM step (Eq. 4) from z_t through an interval of the fine grid; theta- are the student's own weights,
    without a gradient, as in the paper's script, where Eq. 5 has their average; d is the pseudo-Huber
    distance. The adversarial loss of Eq. 8 is left out. The student predicts v. It takes no guidance in
    training: either the teacher is guided (`settings.guided`), and the student learns guided images of one
    pass a step; or it is not (Sec. 3.2), and the student is guided where it is used, with two.

    Args:
        settings: of the loss.
        targets: provides the teacher's x; of `settings.targets`.
        schedule: of teacher and student.
    """

    def __init__(self, settings: PcmSettings, *, targets: TargetSource, schedule: Schedule) -> None:
        self._settings, self._targets, self._schedule = settings, targets, schedule

    def draw(self, batch: Batch, *, step: int) -> Batch:
        """As `snapfusion.training.row_draws.DrawingObjective.draw`."""
        return self._targets.draw(batch, guided=self._settings.guided, step=step)

    def __call__(self, model: nn.Module, batch: Batch, *, step: int) -> Tensor:
        """Return the loss of each row, float32 [B]."""
        return self.loss(model, self._targets(batch, guided=self._settings.guided, step=step))

    def loss(self, model: nn.Module, rows: DistillationBatch) -> Tensor:
        """The loss of rows, float32 [B]; `model` is called without a gradient and then with it."""
        settings, schedule = self._settings, self._schedule
        _, s = interval_ends(rows.interval, student_steps=settings.points, schedule=schedule)
        s_m = phase_ends(rows.interval, points=settings.points, phases=settings.phases, schedule=schedule)
        with torch.no_grad():
            z_s = solver_step(x=rows.x_target, z_t=rows.z_t, t=rows.t, s=s, schedule=schedule)
            target = self._phase_end(model, z_s, s, rows.c, s_m=s_m)
            # At its own end a phase is z_s itself, to the bit.
            target = torch.where((s == s_m).view(-1, 1, 1, 1), z_s, target)
        return pseudo_huber_loss(
            self._phase_end(model, rows.z_t, rows.t, rows.c, s_m=s_m), target, c=settings.huber_c
        )

    def _phase_end(self, model: nn.Module, z_t: Tensor, t: Tensor, c: Tensor, *, s_m: Tensor) -> Tensor:
        """f^m_theta(z_t, t) of Eq. 3."""
        v = predict_velocity(model, z_t, t.clamp(min=0), c)  # the network knows no t = -1
        estimate = self._schedule.from_v(v=v, z_t=z_t, t=t)
        return phase_function(estimate, s_m=s_m, schedule=self._schedule)
