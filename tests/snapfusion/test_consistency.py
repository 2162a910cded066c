"""Consistency functions: the boundary, the scalings of the paper, and the ends of phases."""

import numpy as np
import pytest
import torch
from diffusers import LCMScheduler
from diffusion_oracles import SCHEDULE, alpha_sigma, denoiser, randn

from snapfusion.consistency import (
    boundary_scalings,
    consistency_function,
    phase_ends,
    phase_function,
    solver_step,
)
from snapfusion.distill import teacher_target
from snapfusion.losses import pseudo_huber_loss
from snapfusion.sampling import time_grid
from snapfusion.schedule import Estimate

SCALINGS = {"sigma_data": 0.5, "timestep_scaling": 10.0}


def test_boundary_is_the_clean_end():
    z, x = randn(0), randn(1)
    t = torch.tensor([-1, -1])
    assert torch.equal(consistency_function(x, z_t=z, t=t, **SCALINGS), z)


def test_scalings_are_those_of_the_stock_scheduler():
    t = torch.tensor(time_grid(40)[:-1])
    stock = LCMScheduler().get_scalings_for_boundary_condition_discrete
    for found, expected in zip(boundary_scalings(t, **SCALINGS), stock(t.numpy()), strict=True):
        # One timestep apart, by which our clean end lies below theirs.
        np.testing.assert_allclose(found.flatten().numpy(), expected, rtol=0, atol=1e-6)


def test_solver_step_lands_where_the_teacher_does():
    interval, z_t = torch.tensor([0, 39]), randn(2)
    x = teacher_target(
        denoiser("v_prediction"), z_t, interval=interval, student_steps=40, k=1, schedule=SCHEDULE
    )
    grid = torch.tensor(time_grid(40))
    t, s = grid[interval], grid[interval + 1]
    z_s = solver_step(x=x, z_t=z_t, t=t, s=s, schedule=SCHEDULE)
    for row in range(2):
        (a, sigma), (a_s, sigma_s) = alpha_sigma(int(t[row])), alpha_sigma(int(s[row]))
        x_row, z_row = x[row].double().numpy(), z_t[row].double().numpy()
        expected = a_s * x_row + sigma_s * (z_row - a * x_row) / sigma
        np.testing.assert_allclose(z_s[row].numpy(), expected, rtol=0, atol=2e-6)
    assert torch.equal(z_s[1], x[1])


@pytest.mark.parametrize(("points", "phases"), [(40, 4), (40, 8), (40, 1), (64, 16), (50, 2), (8, 8)])
def test_phases_end_at_the_times_of_the_student(points, phases):
    ends = phase_ends(torch.arange(points), points=points, phases=phases, schedule=SCHEDULE)
    assert ends.tolist() == [end for end in time_grid(phases)[1:] for _ in range(points // phases)]
    grid = time_grid(points)
    assert set(time_grid(phases)) <= set(grid)
    assert all(end <= s for end, s in zip(ends.tolist(), grid[1:], strict=True))


def test_phases_of_fifty_points_leave_our_grid():
    assert not set(time_grid(4)) <= set(time_grid(50))
    with pytest.raises(ValueError, match="4 phases do not divide 50 points"):
        phase_ends(torch.arange(50), points=50, phases=4, schedule=SCHEDULE)


def test_single_phase_is_the_clean_latent():
    estimate = Estimate(x=randn(3), eps=randn(4))
    s_m = torch.tensor([-1, -1])
    assert torch.equal(phase_function(estimate, s_m=s_m, schedule=SCHEDULE), estimate.x)


def test_pseudo_huber_turns_from_square_to_absolute():
    zero = torch.zeros(1, 4, 8, 8)
    small, large = zero + 1e-3, zero + 5.0
    assert float(pseudo_huber_loss(small, zero, c=0.1)) == pytest.approx(1e-6 / 0.2, rel=1e-2)
    assert float(pseudo_huber_loss(large, zero, c=0.001)) == pytest.approx(4.999, rel=1e-6)
    assert pseudo_huber_loss(small, small, c=0.001).tolist() == [0.0]
