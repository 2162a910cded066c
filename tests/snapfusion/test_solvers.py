"""Solvers against diffusers' schedulers, against exact solutions, and against each other."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler

from snapfusion.sampling import sample, time_grid
from snapfusion.schedule import Estimate, Schedule
from snapfusion.solver_names import SOLVERS
from snapfusion.solvers import euler_step, solve, solver_trajectory

SCHEDULE = Schedule()
SD = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "timestep_spacing": "trailing",
}
AGREED = [4, 7, 8, 10, 16, 25, 32, 50]
"""Step counts; these schedulers land at their own trailing times, which are those of our grid."""


def drawn(seed, shape=(2, 4, 8, 8)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def network(z_t, t):
    """A stand-in that depends on the latent and the time in a way that nothing cancels."""
    return 0.8 * (z_t * 0.9 + (t.reshape(-1, 1, 1, 1) + 1) / 1000).tanh()


def denoiser(prediction_type):
    def estimate(z_t, t):
        return SCHEDULE.estimate(network(z_t, t), z_t=z_t, t=t, prediction_type=prediction_type)

    return estimate


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


def library_latents(scheduler, prediction_type, start):
    """Each latent of a diffusers scheduler, from the same noise."""
    latent = start
    for t in scheduler.timesteps:
        latent = scheduler.step(network(latent, t.repeat(len(latent))), t, latent).prev_sample
        yield latent


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("num_steps", AGREED)
def test_dpm_plus_plus_is_diffusers(prediction_type, num_steps):
    scheduler = DPMSolverMultistepScheduler(
        **SD, prediction_type=prediction_type, algorithm_type="dpmsolver++"
    )
    scheduler.set_timesteps(num_steps)
    assert scheduler.timesteps.tolist() == list(time_grid(num_steps)[:-1])
    ours = solver_trajectory(
        denoiser(prediction_type), drawn(0), solver="dpm++", grid=time_grid(num_steps), schedule=SCHEDULE
    )
    theirs = library_latents(scheduler, prediction_type, drawn(0))
    for (_, latent, _), expected in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(latent.numpy(), expected.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*algorithm_type dpmsolver is deprecated:FutureWarning")
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("num_steps", AGREED)
def test_dpm_is_diffusers_up_to_its_last_step(prediction_type, num_steps):
    """diffusers ends that solver at t = 0, where some noise is left; ours goes on to the clean end."""
    scheduler = DPMSolverMultistepScheduler(
        **SD, prediction_type=prediction_type, algorithm_type="dpmsolver", final_sigmas_type="sigma_min"
    )
    scheduler.set_timesteps(num_steps)
    walked = list(
        solver_trajectory(
            denoiser(prediction_type), drawn(0), solver="dpm", grid=time_grid(num_steps), schedule=SCHEDULE
        )
    )
    theirs = list(library_latents(scheduler, prediction_type, drawn(0)))
    for (_, latent, _), expected in zip(walked[:-1], theirs[:-1], strict=True):
        np.testing.assert_allclose(latent.numpy(), expected.numpy(), rtol=1e-4, atol=1e-4)
    _, latent, estimate = walked[-1]
    np.testing.assert_allclose(latent.numpy(), estimate.x.numpy())


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("num_steps", AGREED)
def test_euler_is_diffusers(prediction_type, num_steps):
    scheduler = EulerDiscreteScheduler(**SD, prediction_type=prediction_type)
    scheduler.set_timesteps(num_steps)
    alpha = float(SCHEDULE.alpha(torch.tensor([999])))
    theirs = drawn(0) / alpha  # diffusers walks z / alpha
    walked = solver_trajectory(
        denoiser(prediction_type), drawn(0), solver="euler", grid=time_grid(num_steps), schedule=SCHEDULE
    )
    for t, (t_next, ours, _) in zip(scheduler.timesteps, walked, strict=True):
        output = network(scheduler.scale_model_input(theirs, t), t.long().repeat(2))
        theirs = scheduler.step(output, t, theirs).prev_sample
        expected = theirs * SCHEDULE.alpha(torch.tensor([t_next]))
        np.testing.assert_allclose(ours.numpy(), expected.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_steps", [1, 4, 7, 16, 50])
def test_ddim_is_the_samplers_own_and_euler_lands_with_it(num_steps):
    grid = time_grid(num_steps)
    expected = sample(denoiser("v_prediction"), drawn(0), grid=grid, schedule=SCHEDULE)
    ddim, euler = (
        solve(denoiser("v_prediction"), drawn(0), solver=solver, grid=grid, schedule=SCHEDULE)
        for solver in ("ddim", "euler")
    )
    assert torch.equal(ddim, expected)
    np.testing.assert_allclose(euler.numpy(), expected.numpy(), rtol=1e-5, atol=1e-5)


def test_an_euler_step_is_eulers_rule_in_float64():
    x, eps = drawn(0).double().numpy(), drawn(1).double().numpy()
    alpha_bar = np.cumprod(1.0 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    (a, s), (a_next, s_next) = (((alpha_bar[t]) ** 0.5, (1 - alpha_bar[t]) ** 0.5) for t in (749, 499))
    z = a * x + s * eps
    expected = a_next * (z / a + (s_next / a_next - s / a) * eps)
    estimate = Estimate(x=drawn(0), eps=drawn(1))
    t, t_next = torch.tensor([749, 749]), torch.tensor([499, 499])
    found = euler_step(estimate, z_t=torch.tensor(z).float(), t=t, t_next=t_next, schedule=SCHEDULE)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("num_steps", [1, 2, 8])
def test_one_picture_is_reached_exactly(solver, num_steps):
    """Where all data is one point, x and eps are constant along the flow, and every solver is exact."""
    x, eps = drawn(0), drawn(1)
    denoise, _ = gaussian_data(x, 0.0)
    grid = time_grid(num_steps)
    start = SCHEDULE.diffuse(x=x, eps=eps, t=torch.full((2,), grid[0]))
    found = solve(denoise, start, solver=solver, grid=grid, schedule=SCHEDULE)
    np.testing.assert_allclose(found.numpy(), x.numpy(), atol=1e-5)


@pytest.mark.parametrize(("solver", "order"), [("ddim", 1), ("euler", 1), ("dpm", 2), ("dpm++", 2)])
def test_the_error_on_gaussian_data_falls_with_the_solvers_order(solver, order):
    """The flow of Gaussian data is known: four times as many steps leave 1/4 or 1/16 of the error."""
    denoise, flow = gaussian_data(drawn(0), 0.5)
    start = drawn(1)
    errors = []
    for num_steps in (10, 40):
        grid = tuple(np.rint(np.linspace(879, 239, num_steps + 1)).astype(int).tolist())
        found = solve(denoise, start, solver=solver, grid=grid, schedule=SCHEDULE)
        errors.append(float((found - flow(start, t=879, t_next=239)).abs().mean()))
    assert errors[0] / errors[1] == pytest.approx(4**order, rel=0.25)


def test_higher_order_brings_few_steps_closer_to_many():
    denoise, flow = gaussian_data(drawn(0), 0.5)
    exact = flow(drawn(1), t=999, t_next=-1)
    errors = {
        solver: float(
            (solve(denoise, drawn(1), solver=solver, grid=time_grid(16), schedule=SCHEDULE) - exact)
            .abs()
            .mean()
        )
        for solver in SOLVERS
    }
    assert errors["dpm++"] < errors["ddim"]


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_network_is_asked_once_a_step(solver):
    asked = []

    def recording(z_t, t):
        asked.append(t.tolist())
        return denoiser("v_prediction")(z_t, t)

    solve(recording, drawn(0), solver=solver, grid=time_grid(8), schedule=SCHEDULE)
    assert asked == [[t, t] for t, _ in pairwise(time_grid(8))]


def test_an_unknown_solver_is_refused():
    with pytest.raises(ValueError, match="solver is 'heun'; ddim, euler, dpm, dpm"):
        solve(denoiser("epsilon"), drawn(0), solver="heun", grid=time_grid(2), schedule=SCHEDULE)
