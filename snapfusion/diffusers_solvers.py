"""Solvers of diffusers' own schedulers, on this package's time grid and schedule.

solver            scheduler of diffusers
dpm++singlestep   DPMSolverSinglestepScheduler: DPM-Solver++(2S) (Lu et al. 2022)
unipc             UniPCMultistepScheduler (Zhao et al. 2023)

A step calls the network once. diffusers keeps the estimates that a step needs of those before it.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from snapfusion.schedule import Estimate, Schedule

Step = Callable[[Estimate, int, Tensor], Tensor]
"""(estimate at t, t, z_t) -> z_t'."""


def diffusers_step(solver: str, *, grid: Sequence[int], schedule: Schedule) -> Step:
    """The update rule of one sampling, to be called for each timestep of the grid in turn.

    Raises:
        ValueError: if the grid is not that of a whole sampling, which begins at pure noise.
    """
    scheduler = _scheduler(solver, schedule)
    if solver == "unipc":
        scheduler.set_timesteps(len(grid) - 1)
    else:
        scheduler.set_timesteps(timesteps=list(grid[:-1]))  # its own spacing is not trailing
    if scheduler.timesteps.tolist() != list(grid[:-1]) or grid[-1] != -1:
        raise ValueError(f"{solver} takes the whole time grid, from pure noise to the clean end")

    def step(estimate: Estimate, t: int, z_t: Tensor) -> Tensor:
        latent: Tensor = scheduler.step(estimate.x, t, z_t, return_dict=False)[0]
        return latent

    return step


def _scheduler(solver: str, schedule: Schedule) -> Any:  # noqa: ANN401 - a scheduler of diffusers
    # Imported here: diffusers takes seconds, and the other solvers do not need it.
    from diffusers import DPMSolverSinglestepScheduler, UniPCMultistepScheduler

    shared = {
        "num_train_timesteps": schedule.num_steps,
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "beta_schedule": "scaled_linear",
        "prediction_type": "sample",
        "final_sigmas_type": "zero",
    }
    if solver == "unipc":
        return UniPCMultistepScheduler(**shared, timestep_spacing="trailing")
    return DPMSolverSinglestepScheduler(**shared, algorithm_type="dpmsolver++", lower_order_final=True)
