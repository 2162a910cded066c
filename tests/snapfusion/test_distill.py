"""Eq. 7-16 against a float64 oracle in NumPy, over every interval of every grid."""

import numpy as np
import pytest
import torch
from diffusion_oracles import SCHEDULE, alpha_sigma, ddim_latents, network
from diffusion_oracles import denoiser as denoiser_of
from diffusion_oracles import randn as randn_of
from hypothesis import given, settings
from hypothesis import strategies as st

from snapfusion.distill import teacher_target, x_target
from snapfusion.losses import distillation_loss
from snapfusion.sampling import guide, time_grid
from snapfusion.schedule import Estimate
from snapfusion.solvers import ddim_step

GRIDS = [(student_steps, k) for student_steps in (4, 8, 16) for k in (1, 2, 4, 8)]


def randn(seed, count):
    return randn_of(seed, (count, 4, 4, 4))


def ends(student_steps):
    """t and t'' of every interval."""
    grid = torch.tensor(time_grid(student_steps))
    return grid[:-1], grid[1:]


def output_of(z, t, w):
    """Guided where w is given, by Eq. 10."""
    if w is None:
        return network(z, t, 0.3)
    if isinstance(z, torch.Tensor):
        return guide(cond=network(z, t, 0.3), uncond=network(z, t, -0.2), w=w)
    w = w.double().numpy()
    return w * network(z, t, 0.3) - (w - 1) * network(z, t, -0.2)


def denoiser(prediction_type, w=None):
    return denoiser_of(prediction_type, lambda z_t, t: output_of(z_t, t, w))


def target_of(model, z_t, *, student_steps, k, interval=None):
    """Of every interval, unless some are given."""
    interval = torch.arange(student_steps) if interval is None else torch.tensor(interval)
    return teacher_target(model, z_t, interval=interval, student_steps=student_steps, k=k, schedule=SCHEDULE)


def velocity_of(x, z_t, t):
    """The v that gives x: a student's output that meets the target."""
    return (SCHEDULE.alpha(t) * z_t - x) / SCHEDULE.sigma(t)


def oracle(z_t, *, interval, student_steps, k, prediction_type, w):
    """Endpoint of k steps of Eq. 12 and 13, and the x-target of Eq. 16: float64 [4,h,w], for one row."""
    times = [
        round(1000 * (k * (student_steps - interval) - j) / (k * student_steps)) - 1 for j in range(k + 1)
    ]
    *_, z = ddim_latents(
        z_t[None], grid=times, prediction_type=prediction_type, output=lambda z, t: output_of(z, t, w)
    )
    (a, s), (a2, s2) = alpha_sigma(times[0]), alpha_sigma(times[-1])
    return z[0], (z[0] - s2 / s * z_t.double().numpy()) / (a2 - s2 / s * a)


@pytest.mark.parametrize(("student_steps", "k"), GRIDS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("guided", [False, True])
def test_target_matches_the_oracle(student_steps, k, prediction_type, guided):
    w = torch.linspace(1.0, 14.0, student_steps).view(-1, 1, 1, 1) if guided else None
    z_t = randn(student_steps + k, student_steps)
    target = target_of(denoiser(prediction_type, w), z_t, student_steps=student_steps, k=k)
    assert target.dtype == torch.float32
    t, t2 = ends(student_steps)
    estimate = SCHEDULE.from_v(v=velocity_of(target, z_t, t), z_t=z_t, t=t)
    landed = ddim_step(estimate, t_next=t2, schedule=SCHEDULE)
    for row in range(student_steps):
        options = {"prediction_type": prediction_type, "w": None if w is None else w[row]}
        expected_landing, expected = oracle(
            z_t[row], interval=row, student_steps=student_steps, k=k, **options
        )
        # float32 rounds to 6e-8, and the result is divided by as little as 0.03 (first of 16 steps).
        (a, s), (a2, s2) = alpha_sigma(int(t[row])), alpha_sigma(int(t2[row]))
        scale = max(float(z_t[row].abs().max()), float(np.abs(expected).max()))
        assert np.abs(landed[row].double().numpy() - expected_landing).max() < 5e-6 * scale
        assert np.abs(target[row].double().numpy() - expected).max() < 2e-6 * scale / (a2 - s2 / s * a)


def test_student_on_target_has_no_loss():
    z_t = randn(0, 8)
    t, _ = ends(8)
    target = target_of(denoiser("v_prediction"), z_t, student_steps=8, k=2)
    assert distillation_loss(target, x_target=target, t=t, schedule=SCHEDULE).tolist() == [0.0] * 8
    x_hat = SCHEDULE.from_v(v=velocity_of(target, z_t, t), z_t=z_t, t=t).x
    assert distillation_loss(x_hat, x_target=target, t=t, schedule=SCHEDULE).max() < 1e-9


def test_target_of_an_exact_teacher_is_x():
    x, eps = randn(1, 8), randn(2, 8)
    t, _ = ends(8)
    z_t = SCHEDULE.diffuse(x=x, eps=eps, t=t)
    found = target_of(lambda z, t: Estimate(x=x, eps=eps), z_t, student_steps=8, k=4)
    torch.testing.assert_close(found, x, rtol=0, atol=2e-5)


@settings(deadline=None, max_examples=50)
@given(student_steps=st.integers(1, 64), k=st.integers(1, 8), seed=st.integers(0, 999))
def test_target_is_a_weighted_mean_of_x(student_steps, k, seed):
    calls = []

    def recording(z_t, t):
        calls.append((denoiser("v_prediction")(z_t, t), t))
        return calls[-1][0]

    z_t = randn(seed, student_steps)
    found = target_of(recording, z_t, student_steps=student_steps, k=k)
    low = torch.stack([estimate.x for estimate, _ in calls]).amin(dim=0)
    high = torch.stack([estimate.x for estimate, _ in calls]).amax(dim=0)
    assert bool(((found >= low - 1e-3) & (found <= high + 1e-3)).all())
    assert torch.equal(found[-1], calls[-1][0].x[-1])  # at the clean end, to the bit
    if student_steps > 1:
        ends = [calls[j][1][0] for j in range(k)] + [calls[0][1][1]]
        snr = torch.stack([SCHEDULE.snr(t.view(1)).flatten().double().sqrt() for t in ends]).flatten()
        weights = snr.diff() / (snr[-1] - snr[0])
        pairs = zip(weights, calls, strict=True)
        mean = sum(weight * estimate.x[0].double() for weight, (estimate, _) in pairs)
        torch.testing.assert_close(found[0].double(), mean, rtol=0, atol=1e-3)


def test_target_has_no_gradient():
    weight = torch.ones((), requires_grad=True)

    def teacher(z_t, t):
        return SCHEDULE.from_v(v=weight * z_t, z_t=z_t, t=t)

    assert not target_of(teacher, randn(0, 2), interval=[0, 3], student_steps=4, k=2).requires_grad


def test_x_target_inverts_a_ddim_step():
    z_t, x = randn(0, 3), randn(1, 3)
    t, t2 = torch.tensor([999, 500, 124]), torch.tensor([874, 3, -1])
    estimate = Estimate(x=x, eps=(z_t - SCHEDULE.alpha(t) * x) / SCHEDULE.sigma(t))
    landed = ddim_step(estimate, t_next=t2, schedule=SCHEDULE)
    found = x_target(z_t=z_t, z_t2=landed, t=t, t2=t2, schedule=SCHEDULE)
    torch.testing.assert_close(found, x, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("interval", "student_steps", "k", "message"),
    [
        ([8], 8, 2, r"intervals span 8 \.\. 8; 0 \.\. 7"),
        ([-1, 0], 8, 2, r"intervals span -1 \.\. 0"),
        ([0], 8, 0, r"k is 0; the teacher takes at least 1 step"),
        ([0], 500, 4, r"num_steps is 2000; 1 \.\. 1000"),
    ],
)
def test_intervals_off_the_grid_fail(interval, student_steps, k, message):
    z_t = randn(0, len(interval))
    with pytest.raises(ValueError, match=message):
        target_of(denoiser("epsilon"), z_t, interval=interval, student_steps=student_steps, k=k)
