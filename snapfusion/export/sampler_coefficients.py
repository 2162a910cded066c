"""A sampler as coefficients, so that an application needs no noise schedule of its own.

A DDIM step (SnapFusion Eq. 2) is linear in z_t and in the network's guided output (Eq. 3, 10):

    output = w cond - (w - 1) uncond
    z_t'   = from_z z_t + from_output output

    v (Eq. 7, 8)    from_z      = alpha_t' alpha_t + sigma_t' sigma_t
                    from_output = sigma_t' alpha_t - alpha_t' sigma_t
    eps (Eq. 2)     from_z      = alpha_t' / alpha_t
                    from_output = sigma_t' - alpha_t' sigma_t / alpha_t
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Any, Self

from pydantic import Field

from snapfusion.prediction_types import PredictionType
from snapfusion.schedule import Schedule
from snapfusion.settings import Settings, SettingsError

_TOLERANCE = 1e-12


class StepCoefficients(Settings):
    """One step from t to t_next; all but the two times are float64."""

    t: int
    t_next: int
    alpha: float
    sigma: float
    alpha_next: float
    sigma_next: float
    from_z: float
    from_output: float

    @classmethod
    def between(cls, t: int, t_next: int, *, schedule: Schedule, prediction_type: PredictionType) -> Self:
        """The step of `schedule` for a network that predicts eps or v."""
        alpha, sigma = schedule.coefficients(t)
        alpha_next, sigma_next = schedule.coefficients(t_next)
        levels = {"alpha": alpha, "sigma": sigma, "alpha_next": alpha_next, "sigma_next": sigma_next}
        from_z, from_output = _coefficients(**levels, prediction_type=prediction_type)
        return cls(t=t, t_next=t_next, **levels, from_z=from_z, from_output=from_output)


def _coefficients(
    *, alpha: float, sigma: float, alpha_next: float, sigma_next: float, prediction_type: PredictionType
) -> tuple[float, float]:
    """(from_z, from_output) of the module docstring."""
    if prediction_type == "v_prediction":
        return alpha_next * alpha + sigma_next * sigma, sigma_next * alpha - alpha_next * sigma
    return alpha_next / alpha, sigma_next - alpha_next * sigma / alpha


class SamplerCoefficients(Settings):
    """All steps from noise to the clean latent.

    Attributes:
        steps: in sampling order.
        prediction_type: of the network's output.
        guidance: the w that the model was made for; an application may use another.
    """

    steps: Annotated[tuple[StepCoefficients, ...], Field(min_length=1)]
    prediction_type: PredictionType
    guidance: float

    @classmethod
    def of(
        cls, schedule: Schedule, *, grid: Sequence[int], prediction_type: PredictionType, guidance: float
    ) -> Self:
        """The steps down `grid`, as returned by `snapfusion.sampling.time_grid`."""
        steps = tuple(
            StepCoefficients.between(t, t_next, schedule=schedule, prediction_type=prediction_type)
            for t, t_next in pairwise(grid)
        )
        return cls(steps=steps, prediction_type=prediction_type, guidance=guidance)

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Self:
        """Validate plain JSON values, and check each coefficient against its alphas and sigmas.

        Raises:
            SettingsError: naming what is missing, or the step whose coefficients are inconsistent.
        """
        sampler = super().parse(values)
        sampler._check()
        return sampler

    def _check(self) -> None:
        for index, step in enumerate(self.steps):
            levels = step.model_dump(include={"alpha", "sigma", "alpha_next", "sigma_next"})
            expected = _coefficients(**levels, prediction_type=self.prediction_type)
            for name, value in zip(("from_z", "from_output"), expected, strict=True):
                if not math.isclose(getattr(step, name), value, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE):
                    raise SettingsError(
                        f"step {index} (t = {step.t}): {name} is {getattr(step, name)}, but its alphas and "
                        f"sigmas make it {value}"
                    )
        for index, (step, following) in enumerate(pairwise(self.steps)):
            if step.t_next != following.t:
                raise SettingsError(f"step {index} ends at {step.t_next}, the next begins at {following.t}")
