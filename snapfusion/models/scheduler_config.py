"""Reading the noise schedule and the prediction type from a diffusers scheduler configuration.

Only what the scheduler says of training is read: the noise schedule and the prediction type. Its timesteps
(`timestep_spacing`, `steps_offset`, `set_alpha_to_one`, solver options) concern sampling, for which every
job has its own time grid. `clip_sample` is taken as off, as diffusers' own pipeline takes it.
"""

from collections.abc import Mapping
from typing import Any, get_args

import diffusers
import torch
from diffusers import SchedulerMixin
from torch import Tensor

from snapfusion.models.errors import ModelError
from snapfusion.prediction_types import PREDICTION_TYPES, PredictionType
from snapfusion.schedule import Schedule

_READ = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas"),
    *("prediction_type", "thresholding", "rescale_betas_zero_snr"),
)
_TOLERANCE = 1e-5  # of alpha_t^2, which schedulers compute in float32


def read_scheduler(config: Mapping[str, Any], *, source: str) -> tuple[Schedule, PredictionType]:
    """Read the noise schedule and the prediction type of a model.

    Args:
        config: scheduler_config.json, of any diffusers scheduler with betas (DDIM, PNDM, Euler, DPM, ...).
            What it leaves out has the default of its class.
        source: the model, named in errors.

    Raises:
        ModelError: naming the field that is not supported.
    """
    complete = _complete(config, source=source)
    for field in ("thresholding", "rescale_betas_zero_snr"):
        if complete.get(field):
            raise ModelError(f"{source}: the scheduler's {field} is on; {_REASONS[field]}")
    return _schedule(complete, source=source), _prediction_type(complete, source=source)


def unused_fields(config: Mapping[str, Any]) -> list[str]:
    """List the fields of a scheduler's configuration that have no effect, because they concern sampling."""
    return sorted(name for name in config if name not in _READ and not name.startswith("_"))


_REASONS = {
    "thresholding": "it clips latents as if they were pixels, and is refused",
    "rescale_betas_zero_snr": "zero terminal SNR is refused: x is undefined at t=999",
}


def _complete(config: Mapping[str, Any], *, source: str) -> Mapping[str, Any]:
    """Add the defaults of the scheduler's class to its configuration."""
    name = config.get("_class_name", "DDIMScheduler")
    cls: Any = getattr(diffusers, str(name), None)
    if not (isinstance(cls, type) and issubclass(cls, SchedulerMixin)):
        raise ModelError(f"{source}: {name!r} is not a scheduler of diffusers")
    try:
        scheduler = cls.from_config(dict(config))  # type: ignore[attr-defined]
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ModelError(f"{source}: its {name} configuration is invalid: {error}") from None
    if not hasattr(scheduler, "betas"):
        raise ModelError(f"{source}: {name} has no betas; a model of Stable Diffusion 1 or 2 is accepted")
    return {**scheduler.config, "betas": scheduler.betas}


def _schedule(config: Mapping[str, Any], *, source: str) -> Schedule:
    names = ("num_train_timesteps", "beta_start", "beta_end")
    steps, start, end = (config[name] for name in names)
    try:
        schedule = Schedule(num_steps=steps, beta_start=start, beta_end=end)
    except (TypeError, ValueError) as error:
        raise ModelError(f"{source}: the scheduler's betas are invalid: {error}") from None
    if not has_betas(schedule, config["betas"]):
        trained = config.get("trained_betas") is not None
        field = "trained_betas" if trained else f"beta_schedule {config['beta_schedule']!r}"
        raise ModelError(
            f"{source}: the scheduler's {field} is another noise schedule than 'scaled_linear' from {start} "
            f"to {end}, the only one that is supported"
        )
    return schedule


def has_betas(schedule: Schedule, betas: Tensor) -> bool:
    """Tell whether the betas of another program, [T], are those of a schedule."""
    alpha_bar = torch.cumprod(1.0 - betas.double(), dim=0)
    own = schedule.alpha(torch.arange(schedule.num_steps)).flatten() ** 2
    return alpha_bar.shape == own.shape and bool((alpha_bar - own).abs().max() < _TOLERANCE)


def _prediction_type(config: Mapping[str, Any], *, source: str) -> PredictionType:
    kind = config.get("prediction_type", "epsilon")
    for accepted in get_args(PredictionType):
        if kind == accepted:
            return accepted
    raise ModelError(f"{source}: prediction_type is {kind!r}; {' or '.join(PREDICTION_TYPES)} is accepted")
