"""A sampler as coefficients, so that an application needs no noise schedule of its own.

A DDIM step (SnapFusion Eq. 2) is linear in z_t and in the network's guided output (Eq. 3, 10):

    output = w cond - (w - 1) uncond
    z_t'   = from_z z_t + from_output output + from_noise noise

    v (Eq. 7, 8)    from_z      = alpha_t' alpha_t + sigma_t' sigma_t
                    from_output = sigma_t' alpha_t - alpha_t' sigma_t
    eps (Eq. 2)     from_z      = alpha_t' / alpha_t
                    from_output = sigma_t' - alpha_t' sigma_t / alpha_t

DDIM adds no noise: its from_noise is 0. The consistency sampler (Song et al. 2023) keeps the network's x and
puts fresh noise in the place of its eps: from_noise is sigma_t', and the terms with sigma_t' are left out.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal, Self

from pydantic import Field

from snapfusion.prediction_types import PredictionType
from snapfusion.schedule import Schedule
from snapfusion.settings import Settings, SettingsError
from snapfusion.solver_names import CONSISTENCY

_TOLERANCE = 1e-12

LinearSolver = Literal["ddim", "consistency"]
"""Samplers whose steps are linear in z_t, the output and fresh noise."""


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
    from_noise: float = 0.0

    @classmethod
    def between(
        cls,
        t: int,
        t_next: int,
        *,
        schedule: Schedule,
        prediction_type: PredictionType,
        solver: LinearSolver = "ddim",
    ) -> Self:
        """The step of `schedule` for a network that predicts eps or v."""
        alpha, sigma = schedule.coefficients(t)
        alpha_next, sigma_next = schedule.coefficients(t_next)
        levels = {"alpha": alpha, "sigma": sigma, "alpha_next": alpha_next, "sigma_next": sigma_next}
        coefficients = _coefficients(**levels, prediction_type=prediction_type, solver=solver)
        return cls(t=t, t_next=t_next, **levels, **coefficients)


def _coefficients(
    *,
    alpha: float,
    sigma: float,
    alpha_next: float,
    sigma_next: float,
    prediction_type: PredictionType,
    solver: LinearSolver,
) -> dict[str, float]:
    """The three coefficients of the module docstring."""
    kept, fresh = (0.0, sigma_next) if solver == CONSISTENCY else (sigma_next, 0.0)
    if prediction_type == "v_prediction":
        from_z, from_output = alpha_next * alpha + kept * sigma, kept * alpha - alpha_next * sigma
    else:
        from_z, from_output = alpha_next / alpha, kept - alpha_next * sigma / alpha
    return {"from_z": from_z, "from_output": from_output, "from_noise": fresh}


class SamplerCoefficients(Settings):
    """All steps from noise to the clean latent.

    Attributes:
        steps: in sampling order.
        prediction_type: of the network's output.
        guidance: the w that the model was made for; an application may use another.
        solver: that the coefficients are of.
    """

    steps: Annotated[tuple[StepCoefficients, ...], Field(min_length=1)]
    prediction_type: PredictionType
    guidance: float
    solver: LinearSolver = "ddim"

    @classmethod
    def of(
        cls,
        schedule: Schedule,
        *,
        grid: Sequence[int],
        prediction_type: PredictionType,
        guidance: float,
        solver: LinearSolver = "ddim",
    ) -> Self:
        """The steps down `grid`, as returned by `snapfusion.sampling.time_grid`."""
        kind: dict[str, Any] = {"prediction_type": prediction_type, "solver": solver}
        steps = tuple(
            StepCoefficients.between(t, t_next, schedule=schedule, **kind) for t, t_next in pairwise(grid)
        )
        return cls(steps=steps, guidance=guidance, **kind)

    def to_values(self) -> dict[str, Any]:
        """The coefficients as plain JSON values; those of DDIM are the same as before there were others."""
        values = super().to_values()
        if self.solver == "ddim":
            del values["solver"]
            for step in values["steps"]:
                del step["from_noise"]
        return values

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
            expected = _coefficients(**levels, prediction_type=self.prediction_type, solver=self.solver)
            for name, value in expected.items():
                if not math.isclose(getattr(step, name), value, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE):
                    raise SettingsError(
                        f"step {index} (t = {step.t}): {name} is {getattr(step, name)}, but its alphas and "
                        f"sigmas make it {value}"
                    )
        for index, (step, following) in enumerate(pairwise(self.steps)):
            if step.t_next != following.t:
                raise SettingsError(f"step {index} ends at {step.t_next}, the next begins at {following.t}")
