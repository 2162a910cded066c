"""What the two schedulers of Apple's Swift pipeline for Stable Diffusion 1 and 2 make of a model.

`dpmSolverMultistepScheduler` is DPM-Solver++(2M) over times of its own: with N steps the k-th, from N down to
1, is 999 k / N, rounded. Of less than 15 steps the first and the last two are DDIM's. `pndmScheduler` is PLMS
(Liu et al. 2022); its N + 1 calls begin at 1 + (N - 1) (1000 // N), below the noisiest timestep. Neither
has other settings of Stable Diffusion's noise schedule, and both take eps.
"""

import torch
from diffusers import PNDMScheduler
from torch import Tensor

from snapfusion.sampling import Denoiser
from snapfusion.schedule import Schedule
from snapfusion.solvers import ddim_step, extrapolate_x, extrapolation_factor

DPM, PNDM = "dpmSolverMultistepScheduler", "pndmScheduler"
"""Their names in Swift."""

SCHEDULE = Schedule()
"""The noise schedule of both."""

_FEW_STEPS = 15
"""Below this number of steps, the last two are of first order."""


def apple_latent(denoiser: Denoiser, noise: Tensor, *, scheduler: str, num_steps: int) -> Tensor:
    """The clean latent, [B,4,h,w] float32, that one of the schedulers ends at.

    Args:
        denoiser: with its condition and guidance bound.
        noise: [B,4,h,w] float32.
        scheduler: `DPM` or `PNDM`.
        num_steps: 2 or more for PNDM, which calls the network once more.
    """
    latent = {DPM: _dpm_latent, PNDM: _pndm_latent}[scheduler]
    return latent(denoiser, noise, num_steps=num_steps)


def dpm_times(num_steps: int) -> list[int]:
    """The timesteps of `DPM` with its spacing `linspace`."""
    last = SCHEDULE.num_steps - 1
    # Halves are rounded up, as Swift does.
    return [(2 * last * k + num_steps) // (2 * num_steps) for k in range(num_steps, 0, -1)]


def _dpm_latent(denoiser: Denoiser, z_t: Tensor, *, num_steps: int) -> Tensor:
    times = [torch.full((len(z_t),), time) for time in dpm_times(num_steps)]
    final = num_steps - 2 if num_steps < _FEW_STEPS else num_steps
    previous = None
    for number, t in enumerate(times):
        estimate = step = denoiser(z_t, t)
        if number == num_steps - 1:
            break
        if previous is not None and number < final:
            factor = extrapolation_factor(
                t_previous=times[number - 1], t=t, t_next=times[number + 1], schedule=SCHEDULE
            )
            step = extrapolate_x(estimate, previous, factor=factor, z_t=z_t, t=t, schedule=SCHEDULE)
        z_t, previous = ddim_step(step, t_next=times[number + 1], schedule=SCHEDULE), estimate
    # What is decoded is the network's x of the last step.
    return estimate.x


def _pndm_latent(denoiser: Denoiser, z_t: Tensor, *, num_steps: int) -> Tensor:
    scheduler = PNDMScheduler(
        num_train_timesteps=SCHEDULE.num_steps,
        beta_start=SCHEDULE.beta_start,
        beta_end=SCHEDULE.beta_end,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        steps_offset=1,
    )
    scheduler.set_timesteps(num_steps)
    for time in scheduler.timesteps:
        estimate = denoiser(z_t, torch.full((len(z_t),), int(time)))
        z_t = scheduler.step(estimate.eps, time, z_t, return_dict=False)[0]
    return z_t
