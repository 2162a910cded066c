"""Training-free samplers beside DDIM, on the same time grids. Letters as in `snapfusion.schedule`.

All are DDIM steps made from a better estimate, and ask the network once a step. With
lambda = log(alpha / sigma), which this step raises by h and the step before it raised by h_before:

solver   the step's estimate
ddim     x and eps at z_t
euler    the same; the step is written for z / alpha over sigma / alpha, which gives DDIM's landing
dpm      eps carried on to the middle of the step:   eps + h / (2 h_before) (eps - eps_before)
dpm++    x carried on to the middle of the step:     x + h / (2 h_before) (x - x_before)

"dpm" and "dpm++" are the multistep solvers of second order ("2M"). The paper's DPM-Solver is also known as a
singlestep solver; that one asks at times between those of the grid, twice a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from snapfusion.sampling import CLEAN, Denoiser, ddim_step
from snapfusion.schedule import Estimate, Schedule
from snapfusion.solver_names import SOLVERS, Solver


def solve(
    denoiser: Denoiser, z_t: Tensor, *, solver: Solver, grid: Sequence[int], schedule: Schedule
) -> Tensor:
    """The latent at the end of `grid`, [B,4,h,w] float32, from noise z_t at its start. SnapFusion Table 2.

    Args:
        denoiser: asked once at every time of the grid but the last.
        z_t: [B,4,h,w] float32 at grid[0].
        solver: one of `SOLVERS`.
        grid: falling timesteps, for example of `time_grid`.
        schedule: of alpha_t and sigma_t.

    Raises:
        ValueError: for another solver.
    """
    for _, latent, _ in solver_trajectory(denoiser, z_t, solver=solver, grid=grid, schedule=schedule):
        z_t = latent
    return z_t


def solver_trajectory(
    denoiser: Denoiser, z_t: Tensor, *, solver: Solver, grid: Sequence[int], schedule: Schedule
) -> Iterator[tuple[int, Tensor, Estimate]]:
    """As `sampling.trajectory`, by any solver: (t', z_t', the network's estimate). SnapFusion Table 2.

    The first step has nothing before it, and a step to the clean end no h (lambda is infinite there): by any
    solver these are DDIM steps.

    Raises:
        ValueError: for a solver that is none of `SOLVERS`.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver is {solver!r}; {', '.join(SOLVERS)} are accepted")
    extrapolate = {"dpm": extrapolated_eps, "dpm++": extrapolated_x}.get(solver)
    before: tuple[Tensor, Estimate] | None = None
    for time, next_time in pairwise(grid):
        t = torch.full((len(z_t),), time, dtype=torch.int64, device=z_t.device)
        t_next = torch.full_like(t, next_time)
        estimate = step = denoiser(z_t, t)
        if extrapolate is not None and before is not None and next_time != CLEAN:
            ahead = _half_step(t_before=before[0], t=t, t_next=t_next, schedule=schedule)
            step = extrapolate(estimate, before[1], ahead=ahead, z_t=z_t, t=t, schedule=schedule)
        if solver == "euler":
            z_t = euler_step(step, z_t=z_t, t=t, t_next=t_next, schedule=schedule)
        else:
            z_t = ddim_step(step, t_next=t_next, schedule=schedule)
        before = t, estimate
        yield next_time, z_t, estimate


def euler_step(estimate: Estimate, *, z_t: Tensor, t: Tensor, t_next: Tensor, schedule: Schedule) -> Tensor:
    """z' / alpha' = z / alpha + (sigma' / alpha' - sigma / alpha) eps: Euler's rule (Karras et al. 2022).

    The same landing as `ddim_step`, up to rounding. [B,4,h,w] float32.
    """
    noise, noise_next = (schedule.sigma(time) / schedule.alpha(time) for time in (t, t_next))
    return schedule.alpha(t_next) * (z_t / schedule.alpha(t) + (noise_next - noise) * estimate.eps)


def extrapolated_eps(
    now: Estimate, before: Estimate, *, ahead: Tensor, z_t: Tensor, t: Tensor, schedule: Schedule
) -> Estimate:
    """eps + ahead (eps - eps_before), and the x that z_t then has: DPM-Solver (Lu et al. 2022).

    Args:
        now: the network's estimate at z_t.
        before: its estimate one step earlier.
        ahead: h / (2 h_before), [B,1,1,1] float32: how far to carry on, in steps back.
        z_t: [B,4,h,w] float32 at t.
        t: [B] int64.
        schedule: of alpha_t and sigma_t.
    """
    return schedule.from_eps(eps=now.eps + ahead * (now.eps - before.eps), z_t=z_t, t=t)


def extrapolated_x(
    now: Estimate, before: Estimate, *, ahead: Tensor, z_t: Tensor, t: Tensor, schedule: Schedule
) -> Estimate:
    """x + ahead (x - x_before), and the eps that z_t then has: DPM-Solver++(2M) (Lu et al. 2022).

    Arguments as of `extrapolated_eps`.
    """
    x = now.x + ahead * (now.x - before.x)
    return Estimate(x=x, eps=(z_t - schedule.alpha(t) * x) / schedule.sigma(t))


def _half_step(*, t_before: Tensor, t: Tensor, t_next: Tensor, schedule: Schedule) -> Tensor:
    """h / (2 h_before), where lambda = log(SNR) / 2 rises by h_before up to t and by h up to t_next."""
    before, now, after = (schedule.snr(time).log() for time in (t_before, t, t_next))
    return (after - now) / (2.0 * (now - before))
