"""The distillation target: the x with which one student step lands where k teacher steps land.

symbol   meaning                                                  shape        dtype
i        interval of the student's grid, 0 (noisiest) .. N_S-1    [B]          int64
t, t''   its two ends; t' and the other times between are grid    [B]          int64
         points of k N_S steps
z_t''    the teacher's endpoint                                   [B,4,h,w]    float32

Other notation as in `snapfusion.schedule`. All arithmetic is float32, whatever dtype the networks run in.
"""

import torch
from torch import Tensor

from snapfusion.sampling import Denoiser, time_grid
from snapfusion.schedule import Schedule
from snapfusion.solvers import ddim_step


def x_target(*, z_t: Tensor, z_t2: Tensor, t: Tensor, t2: Tensor, schedule: Schedule) -> Tensor:
    """Return the x with which one DDIM step from z_t at t lands on z_t2 at t2. SnapFusion Eq. 9, 16.

    x = (z_t'' - (sigma_t''/sigma_t) z_t) / (alpha_t'' - (sigma_t''/sigma_t) alpha_t). For DDIM steps of the
    teacher this is the mean of its x, each weighted by the increase of alpha/sigma in its step; at the clean
    end (t2 = -1) it is exactly the last x.

    Args:
        z_t: [B,4,h,w] float32.
        z_t2: [B,4,h,w] float32.
        t: [B] int64, 0 .. T-1.
        t2: [B] int64, below t; -1 is the clean end.
        schedule: gives alpha_t and sigma_t.

    Returns:
        [B,4,h,w] float32.
    """
    ratio = schedule.sigma(t2) / schedule.sigma(t)
    return (z_t2 - ratio * z_t) / (schedule.alpha(t2) - ratio * schedule.alpha(t))


def teacher_target(
    denoiser: Denoiser, z_t: Tensor, *, interval: Tensor, student_steps: int, k: int, schedule: Schedule
) -> Tensor:
    """Compute the x-target of one student step through each interval. SnapFusion Eq. 7 to 9, 12 to 16.

    The teacher takes k DDIM steps from t to t''; k is 2 in the paper, and also 4 and 8 in Fig. 7(c).

    Args:
        denoiser: the teacher with caption and guidance bound; guided at each of its steps (Eq. 10).
        z_t: [B,4,h,w] float32, row b at the noisy end t of interval[b].
        interval: [B] int64 in 0 .. N_S-1.
        student_steps: N_S.
        k: teacher steps per student step.
        schedule: of teacher and student.

    Returns:
        [B,4,h,w] float32, without a gradient.

    Raises:
        ValueError: if k is below 1, k N_S exceeds the schedule, or an interval is not of the grid.
    """
    if k < 1:
        raise ValueError(f"k is {k}; the teacher takes at least 1 step")
    _check(interval, student_steps=student_steps)
    times = time_grid(k * student_steps, schedule_steps=schedule.num_steps)
    grid = torch.tensor(times).to(z_t.device, non_blocking=True)
    first = interval * k
    z = z_t
    with torch.no_grad():
        for step in range(k):
            t_next = grid[first + step + 1]
            z = ddim_step(denoiser(z, grid[first + step]), t_next=t_next, schedule=schedule)
        return x_target(z_t=z_t, z_t2=z, t=grid[first], t2=grid[first + k], schedule=schedule)


def _check(interval: Tensor, *, student_steps: int) -> None:
    # On the CPU only, as in `Schedule`: reading the values from an accelerator would synchronize.
    if interval.device.type != "cpu" or not interval.numel():
        return
    low, high = int(interval.min()), int(interval.max())
    if low < 0 or high >= student_steps:
        raise ValueError(f"intervals span {low} .. {high}; 0 .. {student_steps - 1} is accepted")
