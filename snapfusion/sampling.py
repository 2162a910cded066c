"""Time grids, guidance and deterministic DDIM sampling. Letters as in `snapfusion.schedule`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from itertools import pairwise

import torch
from torch import Tensor

from snapfusion.schedule import Estimate, Schedule

CLEAN = -1
"""The timestep of the clean end, where alpha = 1 and sigma = 0."""

Denoiser = Callable[[Tensor, Tensor], Estimate]
"""(z_t [B,4,h,w] float32, t [B] int64) -> Estimate: a network with its condition and guidance bound."""


def time_grid(num_steps: int, *, schedule_steps: int = 1000) -> tuple[int, ...]:
    """The N+1 timesteps t_k = round_half_even(T k / N) - 1 for k = N..0; the last is -1, the clean end.

    These grids nest: every time of N steps is one of 2N steps (SnapFusion Sec. 4.2 needs t, t' and t'' on
    one grid; diffusers calls this spacing "trailing").

    Raises:
        ValueError: unless 1 <= num_steps <= schedule_steps.
    """
    if not 1 <= num_steps <= schedule_steps:
        raise ValueError(f"num_steps is {num_steps}; 1 .. {schedule_steps} is accepted")
    # A Fraction is exact and rounds half to even; a float step of T / N, added up, would drift off the ties.
    return tuple(round(Fraction(schedule_steps * k, num_steps)) - 1 for k in range(num_steps, -1, -1))


def guide(*, cond: Tensor, uncond: Tensor, w: Tensor | float) -> Tensor:
    """w cond - (w - 1) uncond: classifier-free guidance. SnapFusion Eq. 3 and 10.

    `cond` and `uncond` are network outputs [B,4,h,w] at the same z_t; `w` is a number or [B,1,1,1].
    w = 1 is the conditional output itself.
    """
    return w * cond - (w - 1.0) * uncond


def ddim_step(estimate: Estimate, *, t_next: Tensor, schedule: Schedule) -> Tensor:
    """z_t' = alpha_t' x + sigma_t' eps, [B,4,h,w] float32. SnapFusion Eq. 2.

    diffusers' own step takes t' = t - T // N and so leaves the grid when N does not divide T.
    """
    return schedule.diffuse(x=estimate.x, eps=estimate.eps, t=t_next)


def trajectory(
    denoiser: Denoiser, z_t: Tensor, *, grid: Sequence[int], schedule: Schedule
) -> Iterator[tuple[int, Tensor, Estimate]]:
    """Walk down `grid`; after each DDIM step yield (t', z_t', the estimate it was made from).

    `z_t` is [B,4,h,w] float32 at grid[0]. Ends after grid[-1]. SnapFusion Eq. 2, repeated.
    """
    batch = z_t.shape[0]
    for t, t_next in pairwise(grid):
        estimate = denoiser(z_t, torch.full((batch,), t, dtype=torch.int64, device=z_t.device))
        next_times = torch.full((batch,), t_next, dtype=torch.int64, device=z_t.device)
        z_t = ddim_step(estimate, t_next=next_times, schedule=schedule)
        yield t_next, z_t, estimate


def sample(denoiser: Denoiser, z_t: Tensor, *, grid: Sequence[int], schedule: Schedule) -> Tensor:
    """The latent at the end of `grid`, [B,4,h,w] float32, from noise z_t at its start. SnapFusion Eq. 2."""
    for _, latent, _ in trajectory(denoiser, z_t, grid=grid, schedule=schedule):
        z_t = latent
    return z_t
