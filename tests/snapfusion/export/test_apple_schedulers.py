"""The schedulers of Apple's Swift pipeline, against diffusers' and against times written by hand."""

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from snapfusion.export.apple_schedulers import DPM, PNDM, SCHEDULE, apple_latent, dpm_times
from snapfusion.models.load import load
from snapfusion.noise import gaussian_batch
from snapfusion.sampling import sample, time_grid
from snapfusion.solvers import ddim_step


def denoise(z_t, t):
    """A network whose eps is not linear in z_t."""
    return SCHEDULE.from_eps(eps=torch.tanh(z_t) * SCHEDULE.sigma(t), z_t=z_t, t=t)


@pytest.fixture
def noise():
    return gaussian_batch([0, 1], (4, 8, 8))


@pytest.mark.parametrize(
    ("steps", "times"),
    [(4, [999, 749, 500, 250]), (8, [999, 874, 749, 624, 500, 375, 250, 125]), (1, [999])],
)
def test_times_are_linspace_rounded(steps, times):
    assert dpm_times(steps) == times


def test_times_differ_by_at_most_one():
    for steps in range(1, 101):
        grid = time_grid(steps)[:-1]
        assert max(abs(own - apple) for own, apple in zip(grid, dpm_times(steps), strict=True)) <= 1


def test_many_steps_equal_those_of_diffusers(noise):
    scheduler = DPMSolverMultistepScheduler(
        beta_start=SCHEDULE.beta_start,
        beta_end=SCHEDULE.beta_end,
        beta_schedule="scaled_linear",
        timestep_spacing="linspace",
        final_sigmas_type="zero",
    )
    scheduler.set_timesteps(20)
    z_t = noise
    for time in scheduler.timesteps:
        eps = denoise(z_t, torch.full((2,), int(time))).eps
        z_t = scheduler.step(eps, time, z_t, return_dict=False)[0]
    found = apple_latent(denoise, noise, scheduler=DPM, num_steps=20)
    torch.testing.assert_close(found, z_t, atol=1e-4, rtol=1e-4)


def test_three_steps_are_of_first_order(noise):
    z_t = noise
    for time, after in zip([999, 666], [666, 333], strict=True):
        z_t = ddim_step(denoise(z_t, torch.full((2,), time)), t_next=torch.tensor([after]), schedule=SCHEDULE)
    expected = denoise(z_t, torch.full((2,), 333)).x
    torch.testing.assert_close(apple_latent(denoise, noise, scheduler=DPM, num_steps=3), expected)


@torch.inference_mode()
def test_dpm_is_nearer_to_ddim_than_pndm(noise):
    bundle = load("mini-v")
    c = bundle.encode_text(bundle.tokenize(["a large red circle at the top on a white background"]))
    denoiser = bundle.denoiser(c.expand(2, -1, -1), w=2.5)
    expected = sample(denoiser, noise, grid=time_grid(4), schedule=bundle.schedule)
    dpm, pndm = (
        float((apple_latent(denoiser, noise, scheduler=scheduler, num_steps=4) - expected).square().mean())
        for scheduler in (DPM, PNDM)
    )
    assert 0 < dpm < pndm / 2
