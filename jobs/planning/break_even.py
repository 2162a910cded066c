"""Computes from how many uses on precomputed teacher targets (TARGETS) are cheaper than online ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from snapfusion.training.passes import student_passes, teacher_passes
from snapfusion.training.settings import StepDistillationSettings
from snapfusion.training.step_distillation import BRANCHES


@dataclass(frozen=True, kw_only=True)
class UnitPrices:
    """Prices of one worker's second and of one stored row.

    Attributes:
        tables: of a second of a worker that computes TARGETS.
        training: of a second of a trainer.
        stored: of a row of TARGETS, for as long as it is stored.
    """

    tables: float
    training: float
    stored: float


@dataclass(frozen=True, kw_only=True)
class BreakEven:
    """Precomputed against online targets, for one student.

    Attributes:
        student: its name.
        teacher_seconds: of the teacher for a row, on one worker, averaged over both branches.
        student_seconds: of the student's forward and backward passes for a row, likewise.
        saved: fraction of a step's time that a table saves, by branch and "mixed".
        stored_bytes: of a row of TARGETS.
        pays_from: uses of each target from which the table is cheaper; infinite if it never is.
        used: uses of each target by this training.
    """

    student: str
    teacher_seconds: float
    student_seconds: float
    saved: Mapping[str, float]
    stored_bytes: float
    pays_from: float
    used: float

    @property
    def pays(self) -> bool:
        """Whether the table is cheaper for this training alone."""
        return self.used >= self.pays_from


def break_even(
    name: str,
    steps: StepDistillationSettings,
    *,
    student_seconds: float,
    teacher_seconds: float,
    prices: UnitPrices,
    stored_bytes: float,
    used: float,
    w_conditioned_teacher: bool = False,
) -> BreakEven:
    """Compare precomputed with online targets for one student.

    Computing a target takes the teacher as long in a table as in the trainer. So a table that is used once
    saves only a difference in price: it pays where targets are used again, or computed on cheaper nodes.

    Args:
        name: of the student.
        steps: its distillation settings.
        student_seconds: of a forward and backward pass of one row.
        teacher_seconds: of a forward pass of one row.
        prices: of workers and storage.
        stored_bytes: of a row of TARGETS.
        used: uses of each target by the training.
        w_conditioned_teacher: whether one pass of the teacher gives a guided prediction.
    """
    p = steps.cfg_probability
    shares = {branch: p if branch else 1.0 - p for branch in BRANCHES}
    teacher = {
        branch: teacher_passes(steps, guided=branch, w_conditioned=w_conditioned_teacher) * teacher_seconds
        for branch in BRANCHES
    }
    student = {branch: student_passes(steps, guided=branch) * student_seconds for branch in BRANCHES}
    mixed_teacher, mixed_student = (
        sum(seconds[branch] * share for branch, share in shares.items()) for seconds in (teacher, student)
    )
    saved = {
        name: teacher[branch] / (teacher[branch] + student[branch])
        for branch, name in BRANCHES.items()
        if shares[branch]
    }
    online = mixed_teacher * prices.training
    table = mixed_teacher * prices.tables + prices.stored
    return BreakEven(
        student=name,
        teacher_seconds=mixed_teacher,
        student_seconds=mixed_student,
        saved={**saved, "mixed": mixed_teacher / (mixed_teacher + mixed_student)},
        stored_bytes=stored_bytes,
        pays_from=table / online if online else math.inf,
        used=used,
    )
