"""The learning rate schedule."""

import math

from snapfusion.training.settings import LoopSettings


def learning_rate(step: int, *, settings: LoopSettings) -> float:
    """Return the rate of step `step`, 0 .. num_steps-1: linear warm-up, then constant or cosine to zero."""
    peak, warmup = settings.learning_rate, settings.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    if settings.decay == "constant":
        return peak
    progress = (step - warmup) / max(settings.num_steps - warmup, 1)
    return peak * 0.5 * (1.0 + math.cos(math.pi * progress))
