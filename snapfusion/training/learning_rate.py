"""The learning rate as a function of the step."""

from __future__ import annotations

import math

from snapfusion.training.settings import Decay


def learning_rate(step: int, *, peak: float, warmup_steps: int, num_steps: int, decay: Decay) -> float:
    """The rate of step `step`, 0 .. num_steps-1.

    It rises in a line over `warmup_steps` to `peak`, then stays, or falls to zero along half a cosine.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if decay == "constant":
        return peak
    done = (step - warmup_steps) / max(num_steps - warmup_steps, 1)
    return peak * 0.5 * (1.0 + math.cos(math.pi * done))
