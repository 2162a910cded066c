"""Time grids, classifier-free guidance and deterministic sampling. Notation as in `snapfusion.schedule`."""

from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from itertools import pairwise

import torch
from torch import Tensor

from snapfusion.diffusers_solvers import diffusers_step
from snapfusion.noise import StepNoise
from snapfusion.schedule import Estimate, Schedule
from snapfusion.solver_names import CONSISTENCY, DIFFUSERS_SOLVERS, SOLVERS, Solver
from snapfusion.solvers import ddim_step, euler_step, extrapolate_eps, extrapolate_x, extrapolation_factor

CLEAN = -1
"""The timestep of the clean end, where alpha = 1 and sigma = 0."""

Denoiser = Callable[[Tensor, Tensor], Estimate]
"""(z_t [B,4,h,w] float32, t [B] int64) -> Estimate: a network with its condition and guidance bound."""


def time_grid(num_steps: int, *, schedule_steps: int = 1000) -> tuple[int, ...]:
    """Return the N+1 timesteps t_k = round_half_even(T k / N) - 1 for k = N..0; the last is -1, `CLEAN`.

    The grids nest: every timestep of N steps is one of 2N steps, as SnapFusion Sec. 4.2 needs for t, t' and
    t''. diffusers calls this spacing "trailing".

    Raises:
        ValueError: unless 1 <= num_steps <= schedule_steps.
    """
    if not 1 <= num_steps <= schedule_steps:
        raise ValueError(f"num_steps is {num_steps}; 1 .. {schedule_steps} is accepted")
    # A Fraction is exact and rounds half to even; accumulating a float step of T / N would miss the ties.
    return tuple(round(Fraction(schedule_steps * k, num_steps)) - 1 for k in range(num_steps, -1, -1))


def consistency_grid(num_steps: int, *, points: int, schedule_steps: int = 1000) -> tuple[int, ...]:
    """Return N+1 timesteps for a student that was distilled on a grid of `points` (Luo et al. 2023).

    They are points number floor(k `points` / N) of that grid, k = 0..N-1, and -1: those of `time_grid` where
    N divides `points`; else, as 4 steps on 50 points, those of the paper: 999, 759, 499, 259.

    Raises:
        ValueError: unless 1 <= num_steps <= points.
    """
    if not 1 <= num_steps <= points:
        raise ValueError(
            f"num_steps is {num_steps}; a student of {points} points can be sampled in 1 .. {points} steps"
        )
    fine = time_grid(points, schedule_steps=schedule_steps)
    return (*(fine[points * k // num_steps] for k in range(num_steps)), CLEAN)


def guide(*, cond: Tensor, uncond: Tensor, w: Tensor | float) -> Tensor:
    """Classifier-free guidance: w cond - (w - 1) uncond. SnapFusion Eq. 3 and 10.

    `cond` and `uncond` are network outputs [B,4,h,w] at the same z_t; `w` is a number or [B,1,1,1].
    w = 1 is the conditional output itself.
    """
    return w * cond - (w - 1.0) * uncond


def rescale(guided: Tensor, *, cond: Tensor, share: float) -> Tensor:
    """Give a guided output the standard deviation of the conditional one: Eq. 15 and 16 of (Lin et al. 2023).

    Args:
        guided: of `guide`, [B,4,h,w].
        cond: the conditional output, [B,4,h,w].
        share: phi, of the rescaled output in the result; the paper's is 0.7.
    """
    ratio = cond.std(dim=(1, 2, 3), keepdim=True) / guided.std(dim=(1, 2, 3), keepdim=True)
    return share * ratio * guided + (1.0 - share) * guided


def sample(
    denoiser: Denoiser,
    z_t: Tensor,
    *,
    grid: Sequence[int],
    schedule: Schedule,
    solver: Solver = "ddim",
    noise: StepNoise | None = None,
) -> Tensor:
    """Return the latent at the end of `grid`, [B,4,h,w] float32. SnapFusion Eq. 2, Table 2.

    Args and errors as of `trajectory`.
    """
    for _, latent, _ in trajectory(denoiser, z_t, grid=grid, schedule=schedule, solver=solver, noise=noise):
        z_t = latent
    return z_t


def trajectory(
    denoiser: Denoiser,
    z_t: Tensor,
    *,
    grid: Sequence[int],
    schedule: Schedule,
    solver: Solver = "ddim",
    noise: StepNoise | None = None,
) -> Iterator[tuple[int, Tensor, Estimate]]:
    """Sample step by step: yield (t', z_t', the network's estimate at t) after each step. SnapFusion Eq. 2.

    Args:
        denoiser: called once at every timestep of the grid but the last.
        z_t: noise, [B,4,h,w] float32, at grid[0].
        grid: falling timesteps, for example of `time_grid`.
        schedule: gives alpha_t and sigma_t.
        solver: one of `SOLVERS`.
        noise: of each step, which "consistency" alone takes: it adds fresh noise to the network's x (Song et
            al. 2023).

    Raises:
        ValueError: for any other solver; if one of diffusers' is given a part of a grid; or if "consistency"
            is given no noise.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver is {solver!r}; {', '.join(SOLVERS)} are accepted")
    if solver == CONSISTENCY and noise is None:
        raise ValueError("solver is 'consistency', which needs the noise of each step")
    if solver in DIFFUSERS_SOLVERS:
        yield from _diffusers_trajectory(denoiser, z_t, grid=grid, schedule=schedule, solver=solver)
        return
    extrapolate = {"dpm": extrapolate_eps, "dpm++": extrapolate_x}.get(solver)
    previous: tuple[Tensor, Estimate] | None = None
    for time, next_time in pairwise(grid):
        t = torch.full((len(z_t),), time, dtype=torch.int64, device=z_t.device)
        t_next = torch.full_like(t, next_time)
        estimate = step = denoiser(z_t, t)
        # The first step has no predecessor, and lambda is infinite at the clean end: both steps are DDIM's.
        if extrapolate is not None and previous is not None and next_time != CLEAN:
            factor = extrapolation_factor(t_previous=previous[0], t=t, t_next=t_next, schedule=schedule)
            step = extrapolate(estimate, previous[1], factor=factor, z_t=z_t, t=t, schedule=schedule)
        if noise is not None and solver == CONSISTENCY and next_time != CLEAN:
            step = Estimate(x=estimate.x, eps=noise(next_time))
        if solver == "euler":
            z_t = euler_step(step, z_t=z_t, t=t, t_next=t_next, schedule=schedule)
        else:
            z_t = ddim_step(step, t_next=t_next, schedule=schedule)
        previous = t, estimate
        yield next_time, z_t, estimate


def _diffusers_trajectory(
    denoiser: Denoiser, z_t: Tensor, *, grid: Sequence[int], schedule: Schedule, solver: Solver
) -> Iterator[tuple[int, Tensor, Estimate]]:
    """`trajectory` by a scheduler of diffusers."""
    step = diffusers_step(solver, grid=grid, schedule=schedule)
    for time, next_time in pairwise(grid):
        t = torch.full((len(z_t),), time, dtype=torch.int64, device=z_t.device)
        estimate = denoiser(z_t, t)
        z_t = step(estimate, time, z_t)
        yield next_time, z_t, estimate
