"""Random draws of step distillation, each a function of the row's key: interval and guidance scale.

The noise of a row is `snapfusion.noise.gaussian(key)`. Interval and guidance use a derived key, so that the
three are independent whatever the shape of the latent. Stored and online targets share these functions.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from snapfusion.noise import noise_key, uniform
from snapfusion.sampling import time_grid
from snapfusion.schedule import Schedule
from snapfusion.training.settings import CfgRange


def row_key(seed: int, latent_id: str, draw: int) -> int:
    """Return the key of draw number `draw` of a latent, which fixes its noise, interval and guidance."""
    return noise_key(seed, latent_id, draw)


def draw_intervals(keys: Sequence[int], *, student_steps: int) -> Tensor:
    """Draw i of each row, uniform over the intervals 0 .. `student_steps` - 1 of the grid: int64 [B].

    On the student's grid this is the paper's t ~ U[0, 1] (Eq. 6).
    """
    return torch.tensor([int(_uniforms(key)[0] * student_steps) for key in keys], dtype=torch.int64)


def draw_guidance(keys: Sequence[int], *, cfg_range: CfgRange) -> Tensor:
    """Draw w of each row, uniform over the range: float32 [B]. SnapFusion Sec. 4.2."""
    span = cfg_range.high - cfg_range.low
    draws = [cfg_range.low + span * _uniforms(key)[1] for key in keys]
    return torch.tensor(draws, dtype=torch.float32)


def interval_ends(interval: Tensor, *, student_steps: int, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """Return t and t'' of each row, the first and last timestep of its interval: int64 [B] each."""
    grid = time_grid(student_steps, schedule_steps=schedule.num_steps)
    times = torch.tensor(grid).to(interval.device, non_blocking=True)
    return times[interval], times[interval + 1]


def _uniforms(key: int) -> np.ndarray:
    return uniform(noise_key("interval and guidance", key), 2)
