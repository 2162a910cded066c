"""Counts the passes of the networks in a step of a distillation. SnapFusion Eq. 9-11."""

from dataclasses import dataclass
from functools import lru_cache

from snapfusion.training.settings import Dmd2Settings, StepDistillationSettings

_TRAINED = 3
"""A backward pass takes the time of about two forward passes."""


@lru_cache
def guided_steps(steps: int, *, seed: int, p: float) -> int:
    """Number of a training's guided steps, which follow from its seed."""
    from snapfusion.training.step_distillation import is_guided_step  # which needs torch

    return sum(is_guided_step(seed, step, p) for step in range(steps))


def student_passes(steps: StepDistillationSettings, *, guided: bool) -> int:
    """Passes of the student for a row of a step; L_ori takes one more at times of its own. Eq. 11."""
    passes = 2 if guided and not steps.w_conditioned else 1
    return passes + (1 if steps.gamma and steps.original_times == "schedule" else 0)


def teacher_passes(steps: StepDistillationSettings, *, guided: bool, w_conditioned: bool = False) -> int:
    """Passes of the teacher for a row's target; a w-conditioned one needs one a step. Eq. 9, 10."""
    return steps.k * (2 if guided and not w_conditioned else 1)


def training_passes(steps: StepDistillationSettings | None, *, w_conditioned_teacher: bool = False) -> float:
    """Expected passes for a row of a step, a forward and backward pass counted as three. Eq. 11.

    Without a distillation they are those of L_ori alone (Eq. 6).
    """
    if steps is None:
        return _TRAINED
    p = steps.cfg_probability
    passes = [
        teacher_passes(steps, guided=guided, w_conditioned=w_conditioned_teacher)
        + _TRAINED * student_passes(steps, guided=guided)
        for guided in (False, True)
    ]
    return (1 - p) * passes[False] + p * passes[True]


@dataclass(frozen=True, kw_only=True)
class Dmd2Passes:
    """Passes for a row of a step of distribution matching (Yin et al. 2024, DMD2).

    Attributes:
        student: of the generator without a gradient.
        teacher: of the real score.
        fake: of the fake score without a gradient in its weights; one with a gradient in its input is two.
        trained: of the network that the step trains, forward and backward.
    """

    student: float
    teacher: int
    fake: int
    trained: int


def dmd2_passes(settings: Dmd2Settings, *, generator: bool, depth: float | None = None) -> Dmd2Passes:
    """Passes of a step that trains the generator, or else the fake score, at a depth; None is the mean."""
    before, gan = (settings.steps - 1) / 2 if depth is None else depth, settings.gan is not None
    if not generator:
        return Dmd2Passes(student=before + 1, teacher=0, fake=0, trained=1 + gan)
    return Dmd2Passes(
        student=before,
        teacher=1 if settings.guidance == 1.0 else 2,
        fake=1 + 2 * gan,
        trained=2 if settings.reads_pairs else 1,
    )
