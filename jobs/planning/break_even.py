"""When it pays to compute a teacher's targets beforehand (TARGETS), and when to ask it in the trainer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from jobs.planning.passes import student_passes, teacher_passes
from jobs.planning.rates import Rates
from jobs.planning.sizes import NetworkSize
from snapfusion.training.settings import StepDistillationSettings
from snapfusion.training.step_distillation import BRANCHES


@dataclass(frozen=True, kw_only=True)
class UnitPrices:
    """What a second of one worker costs, and a row that is stored.

    Attributes:
        making: of a worker that computes targets.
        training: of a trainer.
        stored: of one row of TARGETS, for as long as they are kept.
    """

    making: float
    training: float
    stored: float


@dataclass(frozen=True, kw_only=True)
class BreakEven:
    """Offline against online targets, for one student.

    Attributes:
        student: its name.
        teacher_seconds: of the teacher a row, on one worker, both branches as they are mixed.
        student_seconds: of the student a row, forward and backward, likewise.
        saved: share of a step's time that a table spares, by branch, and as they are mixed.
        stored_bytes: of a row of TARGETS.
        pays_from: how often each target must be used before the table is cheaper; infinite if never.
        used: how often this training would use each.
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
        """Whether this training alone makes it worth while."""
        return self.used >= self.pays_from


def break_even(
    name: str,
    steps: StepDistillationSettings,
    *,
    student: NetworkSize,
    teacher: NetworkSize,
    rates: Rates,
    prices: UnitPrices,
    stored_bytes: float,
    used: float,
    again: bool = False,
    told: bool = False,
) -> BreakEven:
    """What a table of targets would spare a student's training, and from how many uses on it pays.

    Making a target takes the teacher as long as asking it in the trainer does, so a table that is used once
    spares nothing but a difference in price: it pays where targets are used again, or made on cheaper nodes.

    Args:
        name: of the student.
        steps: what it learns.
        student: its UNet.
        teacher: the teacher's.
        rates: of the workers.
        prices: of their seconds.
        stored_bytes: of a row of TARGETS.
        used: how often the training would use each.
        again: whether the student's activations are computed again, which its rate does not hold.
        told: whether the teacher is told w.
    """
    trained, asked = rates.seconds("train", student.gmacs), rates.seconds("pass", teacher.gmacs)
    if again:
        trained += rates.seconds("pass", student.gmacs)
    taught = {branch: teacher_passes(steps, guided=branch, told=told) * asked for branch in BRANCHES}
    learnt = {branch: student_passes(steps, guided=branch) * trained for branch in BRANCHES}
    p = steps.cfg_probability
    mixed = {branch: (p if branch else 1.0 - p) for branch in BRANCHES}
    teacher_seconds = sum(taught[branch] * share for branch, share in mixed.items())
    student_seconds = sum(learnt[branch] * share for branch, share in mixed.items())
    saved = {
        word: taught[branch] / (taught[branch] + learnt[branch])
        for branch, word in BRANCHES.items()
        if mixed[branch]
    }
    saved["mixed"] = teacher_seconds / (teacher_seconds + student_seconds)
    spared = teacher_seconds * prices.training
    made = teacher_seconds * prices.making + prices.stored
    return BreakEven(
        student=name,
        teacher_seconds=teacher_seconds,
        student_seconds=student_seconds,
        saved=saved,
        stored_bytes=stored_bytes,
        pays_from=made / spared if spared else math.inf,
        used=used,
    )
