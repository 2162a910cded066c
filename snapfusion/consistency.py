"""Consistency functions: one estimate of the end of a trajectory, or of a phase of it, from any point on it.

LCM is (Luo et al. 2023), arXiv 2310.04378; PCM is (Wang et al. 2024), arXiv 2405.18407.

symbol   meaning                                                      shape        dtype
i        interval of the fine grid, 0 (noisiest) .. N-1               [B]          int64
t, s     its two ends, as t and t'' of `snapfusion.distill`           [B]          int64
s_m      the clean end of the phase of the grid that i lies in        [B]          int64
w        guidance scale, 1 is none                                    [B,1,1,1]    float32

LCM's Eq. 12 counts its guidance from 0, as omega = w - 1; PCM's Eq. 6 has w, its script w - 1.
The clean end is t = -1, alpha = 1 and sigma = 0 exactly. The papers' code ends at t = 0 instead, with the
noise of that timestep left in the target. Other notation as in `snapfusion.schedule`.
"""

import torch
from torch import Tensor

from snapfusion.sampling import time_grid
from snapfusion.schedule import Estimate, Schedule
from snapfusion.solvers import ddim_step


def solver_step(*, x: Tensor, z_t: Tensor, t: Tensor, s: Tensor, schedule: Schedule) -> Tensor:
    """z_s: one DDIM step with the teacher's x: Eq. 17 of (Luo et al. 2023), Eq. 4 of (Wang et al. 2024).

    The inverse of `distill.x_target`. A DDIM step is linear in the noise, so the guided step is the step with
    guided x, as Eq. 17 combines it from two.

    Args:
        x: the teacher's x at z_t, guided or not, [B,4,h,w] float32.
        z_t: [B,4,h,w] float32.
        t: [B] int64, 0 .. T-1.
        s: [B] int64, below t.
        schedule: gives alpha and sigma.
    """
    eps = (z_t - schedule.alpha(t) * x) / schedule.sigma(t)
    return ddim_step(Estimate(x=x, eps=eps), t_next=s, schedule=schedule)


def boundary_scalings(t: Tensor, *, sigma_data: float, timestep_scaling: float) -> tuple[Tensor, Tensor]:
    """c_skip and c_out of Eq. 9 of (Luo et al. 2023), each [B,1,1,1] float32, for t [B] int64.

    The paper gives their values at the boundary alone, 1 and 0; the formulas are its code's. With
    r = `timestep_scaling` (t + 1), c_skip = sigma_data^2 / (r^2 + sigma_data^2) and
    c_out = r / sqrt(r^2 + sigma_data^2). The + 1 moves the boundary to our clean end.
    """
    r = (timestep_scaling * (t + 1)).float().view(-1, 1, 1, 1)
    square = r.square() + sigma_data**2
    return sigma_data**2 / square, r / square.sqrt()


def consistency_function(
    x: Tensor, *, z_t: Tensor, t: Tensor, sigma_data: float, timestep_scaling: float
) -> Tensor:
    """f = c_skip(t) z_t + c_out(t) x, the estimate of the clean latent: Eq. 9 of (Luo et al. 2023).

    Args:
        x: the network's x at z_t, [B,4,h,w] float32.
        z_t: [B,4,h,w] float32.
        t: [B] int64; at -1 f is z_t itself.
        sigma_data: of `boundary_scalings`.
        timestep_scaling: likewise.
    """
    c_skip, c_out = boundary_scalings(t, sigma_data=sigma_data, timestep_scaling=timestep_scaling)
    return c_skip * z_t + c_out * x


def phase_ends(interval: Tensor, *, points: int, phases: int, schedule: Schedule) -> Tensor:
    """s_m of each interval i of the fine grid, [B] int64: the edges of Sec. 3.1 of (Wang et al. 2024).

    Args:
        interval: i, [B] int64 in 0 .. `points` - 1.
        points: N, intervals of the fine grid.
        phases: of equally many intervals each, so that they end at the times of the grid of so many steps.
        schedule: gives the number of timesteps.

    Raises:
        ValueError: if `phases` does not divide `points`.
    """
    if points % phases:
        raise ValueError(f"{phases} phases do not divide {points} points; a divisor is needed")
    grid = torch.tensor(time_grid(phases, schedule_steps=schedule.num_steps)).to(
        interval.device, non_blocking=True
    )
    return grid[interval * phases // points + 1]


def phase_function(estimate: Estimate, *, s_m: Tensor, schedule: Schedule) -> Tensor:
    """z at s_m: one DDIM step from the network's estimate to the phase's end: Eq. 3 of (Wang et al. 2024).

    [B,4,h,w] float32; with a single phase it is the network's x.
    """
    return ddim_step(estimate, t_next=s_m, schedule=schedule)
