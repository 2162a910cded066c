"""The learning rate schedule."""

import math

from snapfusion.training.settings import NetworkSettings


def learning_rate(step: int, *, num_steps: int, settings: NetworkSettings) -> float:
    """Return the rate of step `step`, 0 .. num_steps-1: linear warm-up, then constant or cosine to zero."""
    peak, warmup = settings.learning_rate, settings.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    if settings.decay == "constant":
        return peak
    progress = (step - warmup) / max(num_steps - warmup, 1)
    return peak * 0.5 * (1.0 + math.cos(math.pi * progress))
