"""Time grids, guidance and DDIM sampling, against a float64 oracle and diffusers' DDIMScheduler."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from diffusion_oracles import SCHEDULE, ddim_latents, denoiser, network, randn
from hypothesis import given, settings
from hypothesis import strategies as st

from snapfusion.sampling import CLEAN, consistency_grid, guide, rescale, sample, time_grid, trajectory
from snapfusion.schedule import Estimate
from snapfusion.solvers import ddim_step


def diffusers_scheduler(prediction_type, num_steps) -> DDIMScheduler:
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        timestep_spacing="trailing",
        prediction_type=prediction_type,
        set_alpha_to_one=True,
        clip_sample=False,
    )
    scheduler.set_timesteps(num_steps)
    return scheduler


def test_eight_step_grid():
    assert time_grid(8) == (999, 874, 749, 624, 499, 374, 249, 124, -1)
    assert time_grid(1) == (999, -1)


def test_grid_rounds_ties_to_even():
    # 1000 k / 16 ends in .5 for odd k: 62.5 -> 62, 187.5 -> 188, 312.5 -> 312, 437.5 -> 438, ...
    assert [t + 1 for t in time_grid(16)[::-1][1::2]] == [62, 188, 312, 438, 562, 688, 812, 938]


@given(st.integers(1, 1000))
@settings(deadline=None)  # the machine may be busy
def test_grid_falls_from_noise_to_the_clean_end(num_steps):
    grid = time_grid(num_steps)
    assert len(grid) == num_steps + 1
    assert (grid[0], grid[-1]) == (999, CLEAN)
    assert all(t > t_next for t, t_next in pairwise(grid))
    # A float quotient is exact at every tie, and rint rounds those to even.
    assert list(grid) == (np.rint(1000 * np.arange(num_steps, -1, -1) / num_steps) - 1).tolist()


@given(st.integers(1, 500))
@settings(deadline=None)
def test_grid_nests_in_one_twice_as_fine(num_steps):
    assert time_grid(2 * num_steps)[::2] == time_grid(num_steps)


@pytest.mark.parametrize("share", [0.0, 0.7, 1.0])
def test_rescaled_guidance_matches_diffusers(share):
    cond, uncond = randn(0), randn(1)
    guided = guide(cond=cond, uncond=uncond, w=5.0)
    expected = rescale_noise_cfg(guided, cond, guidance_rescale=share)
    torch.testing.assert_close(rescale(guided, cond=cond, share=share), expected, rtol=1e-5, atol=1e-5)
    deviations = [part.std(dim=(1, 2, 3)) for part in (rescale(guided, cond=cond, share=1.0), cond)]
    torch.testing.assert_close(*deviations)


@pytest.mark.parametrize("num_steps", [0, -3, 1001])
def test_grid_of_no_or_too_many_steps_fails(num_steps):
    with pytest.raises(ValueError, match=rf"num_steps is {num_steps}; 1 \.\. 1000"):
        time_grid(num_steps)


@pytest.mark.parametrize("points", [40, 50, 64])
@pytest.mark.parametrize("num_steps", [1, 2, 4, 8])
def test_grid_of_a_consistency_student(num_steps, points):
    grid = consistency_grid(num_steps, points=points)
    assert set(grid) <= set(time_grid(points))
    if points % num_steps == 0:
        assert grid == time_grid(num_steps)
    if points == 50:
        scheduler = LCMScheduler(original_inference_steps=50)
        scheduler.set_timesteps(num_steps)
        assert list(grid[:-1]) == scheduler.timesteps.tolist()


def test_grid_has_at_most_the_students_points():
    with pytest.raises(ValueError, match=r"a student of 8 points can be sampled in 1 \.\. 8 steps"):
        consistency_grid(9, points=8)


def test_grid_of_a_shorter_schedule():
    assert time_grid(4, schedule_steps=100) == (99, 74, 49, 24, -1)


def test_guidance_matches_the_formula_in_float64():
    cond, uncond = randn(0), randn(1)
    w = torch.tensor([2.0, 14.0]).view(2, 1, 1, 1)
    expected = w.double() * cond.double() - (w.double() - 1) * uncond.double()
    np.testing.assert_allclose(guide(cond=cond, uncond=uncond, w=w).numpy(), expected.numpy(), atol=2e-5)


def test_guidance_scale_one_is_conditional():
    assert torch.equal(guide(cond=randn(0), uncond=randn(1), w=1.0), randn(0))


@pytest.mark.parametrize("t", [999, 874, 499, 124])
def test_guiding_eps_and_v_agree(t):
    z_t, cond, uncond, times = randn(0), randn(1), randn(2), torch.full((2,), t)

    def velocity(eps):
        return SCHEDULE.velocity(x=SCHEDULE.from_eps(eps=eps, z_t=z_t, t=times).x, eps=eps, t=times)

    by_eps = SCHEDULE.from_eps(eps=guide(cond=cond, uncond=uncond, w=7.5), z_t=z_t, t=times)
    by_v = SCHEDULE.from_v(v=guide(cond=velocity(cond), uncond=velocity(uncond), w=7.5), z_t=z_t, t=times)
    scale = float(by_eps.x.abs().max())
    np.testing.assert_allclose(by_v.x.numpy(), by_eps.x.numpy(), atol=3e-6 * scale)
    np.testing.assert_allclose(by_v.eps.numpy(), by_eps.eps.numpy(), atol=3e-6 * scale)


@pytest.mark.parametrize("num_steps", [1, 8, 16, 32, 50])
def test_true_eps_leads_back_to_x(num_steps):
    x, eps = randn(0), randn(1)
    grid = time_grid(num_steps)
    start = SCHEDULE.diffuse(x=x, eps=eps, t=torch.full((2,), grid[0]))

    def true_denoiser(z_t, t):
        return SCHEDULE.from_eps(eps=eps, z_t=z_t, t=t)

    # float32 errors of the first step are scaled by 1 / alpha_999 = 14.6.
    np.testing.assert_allclose(sample(true_denoiser, start, grid=grid, schedule=SCHEDULE), x, atol=3e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("num_steps", [1, 7, 8, 16, 32, 50])
def test_trajectory_matches_the_oracle(prediction_type, num_steps):
    grid = time_grid(num_steps)
    start = randn(0)
    expected = list(ddim_latents(start, grid=grid, prediction_type=prediction_type))
    steps = list(trajectory(denoiser(prediction_type), start, grid=grid, schedule=SCHEDULE))
    assert [t for t, _, _ in steps] == list(grid[1:])
    for (_, latent, _), truth in zip(steps, expected, strict=True):
        assert latent.dtype == torch.float32
        np.testing.assert_allclose(latent.numpy(), truth, rtol=1e-5, atol=1e-5)


def test_trajectory_ends_at_the_last_x():
    steps = trajectory(denoiser("epsilon"), randn(0), grid=time_grid(8), schedule=SCHEDULE)
    *_, (t, latent, estimate) = steps
    assert t == CLEAN
    assert torch.equal(latent, estimate.x)


def test_rows_of_a_step_may_differ_in_time():
    estimate = Estimate(x=randn(0), eps=randn(1))
    together = ddim_step(estimate, t_next=torch.tensor([499, -1]), schedule=SCHEDULE)
    for row, t_next in enumerate([499, -1]):
        one = slice(row, row + 1)
        alone = Estimate(x=estimate.x[one], eps=estimate.eps[one])
        found = ddim_step(alone, t_next=torch.tensor([t_next]), schedule=SCHEDULE)
        assert torch.equal(together[one], found)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("num_steps", [1, 4, 8, 10, 20, 25, 50])
def test_ddim_matches_diffusers_where_steps_divide(prediction_type, num_steps):
    scheduler = diffusers_scheduler(prediction_type, num_steps)
    assert scheduler.timesteps.tolist() == list(time_grid(num_steps)[:-1])
    theirs = randn(0)
    steps = trajectory(denoiser(prediction_type), randn(0), grid=time_grid(num_steps), schedule=SCHEDULE)
    for t, (_, ours, _) in zip(scheduler.timesteps, steps, strict=True):
        theirs = scheduler.step(network(theirs, t.repeat(2)), t, theirs).prev_sample
        np.testing.assert_allclose(ours.numpy(), theirs.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("num_steps", "off"), [(8, 0), (16, 8), (32, 8), (50, 0)])
def test_diffusers_ddim_leaves_its_own_grid(num_steps, off):
    """DDIMScheduler steps from our timesteps to t - 1000 // N, off the grid for N = 16 and 32."""
    scheduler = diffusers_scheduler("v_prediction", num_steps)
    grid = time_grid(num_steps)
    assert scheduler.timesteps.tolist() == list(grid[:-1])
    z_t, v = randn(0), randn(1)
    landings = 0
    for t, t_next in pairwise(grid[:-1]):
        theirs = scheduler.step(v, t, z_t).prev_sample
        estimate = SCHEDULE.from_v(v=v, z_t=z_t, t=torch.full((2,), t))
        ours = ddim_step(estimate, t_next=torch.full((2,), t_next), schedule=SCHEDULE)
        beside = ddim_step(estimate, t_next=torch.full((2,), t - 1000 // num_steps), schedule=SCHEDULE)
        np.testing.assert_allclose(beside.numpy(), theirs.numpy(), rtol=1e-5, atol=1e-5)
        landings += not np.allclose(ours.numpy(), theirs.numpy(), rtol=1e-5, atol=1e-5)
    assert landings == off
