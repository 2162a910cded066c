"""What a row of step distillation draws from its key: its interval of the student's grid, and its guidance.

The noise of the row is `snapfusion.noise.gaussian(key)`; the two draws here come from a key derived from it,
so that none of the three tells of another, whatever the latent's shape. Targets in a table and targets
made while training draw alike, because both draw here.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from snapfusion.noise import noise_key, uniform
from snapfusion.sampling import time_grid
from snapfusion.schedule import Schedule
from snapfusion.training.settings import CfgRange


def row_key(seed: int, latent_id: str, draw: int) -> int:
    """The key of draw number `draw` of a latent: what its noise, interval and guidance follow from."""
    return noise_key(seed, latent_id, draw)


def draw_intervals(keys: Sequence[int], *, student_steps: int) -> Tensor:
    """i of each row, uniform over the intervals 0 .. `student_steps` - 1 of the grid: int64 [B].

    SnapFusion draws t ~ U[0, 1] (Eq. 6); on the student's grid that is the choice of an interval.
    """
    drawn = [int(_uniforms(key)[0] * student_steps) for key in keys]
    return torch.tensor(drawn, dtype=torch.int64)


def draw_guidance(keys: Sequence[int], *, cfg_range: CfgRange) -> Tensor:
    """w of each row, uniform over the range: float32 [B]. SnapFusion Sec. 4.2."""
    span = cfg_range.high - cfg_range.low
    drawn = [cfg_range.low + span * _uniforms(key)[1] for key in keys]
    return torch.tensor(drawn, dtype=torch.float32)


def interval_ends(interval: Tensor, *, student_steps: int, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """t and t'' of each row, the interval's first and last time: int64 [B] each, on its device."""
    ends = torch.tensor(
        list(pairwise(time_grid(student_steps, schedule_steps=schedule.num_steps))), device=interval.device
    )
    t, t2 = ends[interval].unbind(dim=1)
    return t, t2


def _uniforms(key: int) -> np.ndarray:
    return uniform(noise_key("interval and guidance", key), 2)
