"""Number of UNet passes that a training step takes."""

from __future__ import annotations

from functools import lru_cache

from snapfusion.training.settings import StepDistillationSettings
from snapfusion.training.step_distillation import is_guided_step


@lru_cache
def guided_steps(steps: int, *, seed: int, p: float) -> int:
    """How many of a training's steps are guided; they follow from its seed."""
    return sum(is_guided_step(seed, step, p) for step in range(steps))


def student_passes(steps: StepDistillationSettings, *, guided: bool) -> int:
    """How often the student is asked of a row of a step. SnapFusion Eq. 11."""
    lesson = 2 if guided and not steps.w_conditioned else 1
    return lesson + (1 if steps.gamma and steps.original_times == "schedule" else 0)


def teacher_passes(steps: StepDistillationSettings, *, guided: bool, told: bool = False) -> int:
    """How often the teacher is asked for a row's target; one that is told w, once a step. Eq. 9, 10."""
    return steps.k * (2 if guided and not told else 1)
