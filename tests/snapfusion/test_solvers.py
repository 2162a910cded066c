"""Solvers against diffusers' schedulers, against exact solutions, and against each other."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)
from diffusion_oracles import SCHEDULE, alpha_sigma, denoiser, network, randn

from snapfusion.sampling import sample, time_grid, trajectory
from snapfusion.schedule import Estimate
from snapfusion.solver_names import DIFFUSERS_SOLVERS, SOLVERS
from snapfusion.solvers import euler_step

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SD = {**BETAS, "timestep_spacing": "trailing"}
STEPS = pytest.mark.parametrize("num_steps", [4, 7, 8, 10, 16, 25, 32, 50])
PREDICTIONS = pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])


def gaussian_data(mean, spread):
    """The exact denoiser of data N(mean, spread^2), and the exact latent at t' that its flow takes z_t to."""

    def strengths(t):
        return SCHEDULE.alpha(t), (SCHEDULE.alpha(t) ** 2 * spread**2 + SCHEDULE.sigma(t) ** 2).sqrt()

    def denoise(z_t, t):
        alpha, total = strengths(t)
        x = mean + alpha * spread**2 / total**2 * (z_t - alpha * mean)
        sigma = SCHEDULE.sigma(t)
        return Estimate(x=x, eps=sigma / total**2 * (z_t - alpha * mean))

    def flow(z_t, *, t, t_next):
        (alpha, total), (alpha_next, total_next) = (
            strengths(torch.full((len(z_t),), time)) for time in (t, t_next)
        )
        return alpha_next * mean + total_next / total * (z_t - alpha * mean)

    return denoise, flow


def steps_of(solver, prediction_type, num_steps):
    grid = time_grid(num_steps)
    return list(trajectory(denoiser(prediction_type), randn(0), solver=solver, grid=grid, schedule=SCHEDULE))


def dpm_latents(prediction_type, num_steps, **options):
    """Each latent of diffusers' scheduler, from the same noise."""
    scheduler = DPMSolverMultistepScheduler(**SD, prediction_type=prediction_type, **options)
    scheduler.set_timesteps(num_steps)
    assert scheduler.timesteps.tolist() == list(time_grid(num_steps)[:-1])
    latent = randn(0)
    for t in scheduler.timesteps:
        latent = scheduler.step(network(latent, t.repeat(len(latent))), t, latent).prev_sample
        yield latent


@PREDICTIONS
@STEPS
def test_dpm_plus_plus_matches_diffusers(prediction_type, num_steps):
    theirs = dpm_latents(prediction_type, num_steps, algorithm_type="dpmsolver++")
    for (_, latent, _), expected in zip(steps_of("dpm++", prediction_type, num_steps), theirs, strict=True):
        np.testing.assert_allclose(latent.numpy(), expected.numpy(), rtol=1e-4, atol=1e-4)


@PREDICTIONS
@STEPS
def test_unipc_matches_diffusers(prediction_type, num_steps):
    scheduler = UniPCMultistepScheduler(**SD, prediction_type=prediction_type)
    scheduler.set_timesteps(num_steps)
    expected = randn(0)
    ours = steps_of("unipc", prediction_type, num_steps)
    for t, (_, latent, _) in zip(scheduler.timesteps, ours, strict=True):
        expected = scheduler.step(network(expected, t.repeat(2)), t, expected).prev_sample
        np.testing.assert_allclose(latent.numpy(), expected.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("solver", DIFFUSERS_SOLVERS)
def test_solvers_of_diffusers_are_closer_in_few_steps(solver):
    denoise, flow = gaussian_data(randn(0), 0.5)
    exact = flow(randn(1), t=999, t_next=-1)
    found, ddim = (
        sample(denoise, randn(1), solver=name, grid=time_grid(16), schedule=SCHEDULE)
        for name in (solver, "ddim")
    )
    assert (found - exact).abs().mean() < 0.9 * (ddim - exact).abs().mean()


def test_solvers_of_diffusers_need_a_whole_grid():
    with pytest.raises(ValueError, match="unipc takes the whole time grid"):
        sample(denoiser("epsilon"), randn(0), solver="unipc", grid=time_grid(8)[2:], schedule=SCHEDULE)


@pytest.mark.filterwarnings("ignore:.*algorithm_type dpmsolver is deprecated:FutureWarning")
@PREDICTIONS
@STEPS
def test_dpm_matches_diffusers_before_its_last_step(prediction_type, num_steps):
    """diffusers ends this solver at t = 0, where some noise is left; ours at the clean end."""
    *ours, (_, latent, estimate) = steps_of("dpm", prediction_type, num_steps)
    options = {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}
    theirs = list(dpm_latents(prediction_type, num_steps, **options))
    for (_, mine, _), expected in zip(ours, theirs[:-1], strict=True):
        np.testing.assert_allclose(mine.numpy(), expected.numpy(), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(latent.numpy(), estimate.x.numpy())


@PREDICTIONS
@STEPS
def test_euler_matches_diffusers(prediction_type, num_steps):
    scheduler = EulerDiscreteScheduler(**SD, prediction_type=prediction_type)
    scheduler.set_timesteps(num_steps)
    theirs = randn(0) / float(SCHEDULE.alpha(torch.tensor([999])))  # diffusers samples z / alpha
    ours = steps_of("euler", prediction_type, num_steps)
    for t, (t_next, latent, _) in zip(scheduler.timesteps, ours, strict=True):
        output = network(scheduler.scale_model_input(theirs, t), t.long().repeat(2))
        theirs = scheduler.step(output, t, theirs).prev_sample
        expected = theirs * SCHEDULE.alpha(torch.tensor([t_next]))
        np.testing.assert_allclose(latent.numpy(), expected.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_steps", [1, 4, 7, 16, 50])
def test_euler_lands_where_ddim_lands(num_steps):
    ddim, euler = (steps_of(solver, "v_prediction", num_steps)[-1][1].numpy() for solver in ("ddim", "euler"))
    np.testing.assert_allclose(euler, ddim, rtol=1e-5, atol=1e-5)


def test_euler_step_matches_float64():
    x, eps = randn(0).double().numpy(), randn(1).double().numpy()
    (a, s), (a_next, s_next) = alpha_sigma(749), alpha_sigma(499)
    z = a * x + s * eps
    expected = a_next * (z / a + (s_next / a_next - s / a) * eps)
    estimate = Estimate(x=randn(0), eps=randn(1))
    t, t_next = torch.tensor([749, 749]), torch.tensor([499, 499])
    found = euler_step(estimate, z_t=torch.tensor(z).float(), t=t, t_next=t_next, schedule=SCHEDULE)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("num_steps", [1, 2, 8])
def test_single_data_point_is_reached_exactly(solver, num_steps):
    """If all data is one point, x and eps are constant along the flow, and every solver is exact."""
    x, eps = randn(0), randn(1)
    denoise, _ = gaussian_data(x, 0.0)
    grid = time_grid(num_steps)
    start = SCHEDULE.diffuse(x=x, eps=eps, t=torch.full((2,), grid[0]))
    found = sample(denoise, start, solver=solver, grid=grid, schedule=SCHEDULE, noise=randn)
    np.testing.assert_allclose(found.numpy(), x.numpy(), atol=1e-5)


@pytest.mark.parametrize(("solver", "order"), [("ddim", 1), ("euler", 1), ("dpm", 2), ("dpm++", 2)])
def test_error_falls_with_the_order(solver, order):
    """The flow of Gaussian data is known: four times the steps leave 1/4 or 1/16 of the error."""
    denoise, flow = gaussian_data(randn(0), 0.5)
    start = randn(1)
    errors = []
    for num_steps in (10, 40):
        grid = tuple(np.rint(np.linspace(879, 239, num_steps + 1)).astype(int).tolist())
        found = sample(denoise, start, solver=solver, grid=grid, schedule=SCHEDULE)
        errors.append(float((found - flow(start, t=879, t_next=239)).abs().mean()))
    assert errors[0] / errors[1] == pytest.approx(4**order, rel=0.25)


def test_second_order_is_closer_in_few_steps():
    denoise, flow = gaussian_data(randn(0), 0.5)
    exact = flow(randn(1), t=999, t_next=-1)
    second, first = (
        sample(denoise, randn(1), solver=solver, grid=time_grid(16), schedule=SCHEDULE)
        for solver in ("dpm++", "ddim")
    )
    assert (second - exact).abs().mean() < (first - exact).abs().mean()


@pytest.mark.parametrize("solver", SOLVERS)
def test_network_is_called_once_per_step(solver):
    times = []

    def recording(z_t, t):
        times.append(t.tolist())
        return denoiser("v_prediction")(z_t, t)

    sample(recording, randn(0), solver=solver, grid=time_grid(8), schedule=SCHEDULE, noise=randn)
    assert times == [[t, t] for t, _ in pairwise(time_grid(8))]


def test_consistency_sampler_matches_the_stock_one():
    """LCMScheduler's rule with our noise, but for its c_skip, which is below 1e-6 at these timesteps."""
    grid, z_t = time_grid(4), randn(0)
    scheduler = LCMScheduler(**BETAS, prediction_type="v_prediction", set_alpha_to_one=True)
    scheduler.set_timesteps(4, original_inference_steps=4)
    assert scheduler.timesteps.tolist() == list(grid[:-1])
    steps = trajectory(
        denoiser("v_prediction"), z_t, grid=grid, schedule=SCHEDULE, solver="consistency", noise=randn
    )
    for t, t_next, (_, latent, _) in zip(grid[:-1], grid[1:], steps, strict=True):
        output = network(z_t, torch.tensor([t, t]))
        x = scheduler.step(output, t, z_t, return_dict=False)[1]
        alpha, sigma = alpha_sigma(t_next)
        expected = x if t_next == -1 else alpha * x + sigma * randn(t_next)
        np.testing.assert_allclose(latent.numpy(), expected.numpy(), rtol=1e-5, atol=1e-5)
        z_t = latent


def test_consistency_sampler_needs_noise():
    with pytest.raises(ValueError, match="needs the noise of each step"):
        sample(denoiser("epsilon"), randn(0), solver="consistency", grid=time_grid(2), schedule=SCHEDULE)


def test_unknown_solver_fails():
    with pytest.raises(ValueError, match="solver is 'heun'; ddim, euler, dpm, dpm"):
        sample(denoiser("epsilon"), randn(0), solver="heun", grid=time_grid(2), schedule=SCHEDULE)
