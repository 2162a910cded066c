"""A sampler as numbers: what an application multiplies by, so that it needs no schedule of its own.

A DDIM step (SnapFusion Eq. 2) is linear in z_t and in the network's guided output (Eq. 3, 10):

    output = w cond - (w - 1) uncond
    z_t'   = from_z z_t + from_output output

    v (Eq. 7, 8)    from_z      = alpha_t' alpha_t + sigma_t' sigma_t
                    from_output = sigma_t' alpha_t - alpha_t' sigma_t
    eps (Eq. 2)     from_z      = alpha_t' / alpha_t
                    from_output = sigma_t' - alpha_t' sigma_t / alpha_t
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any, Self

from snapfusion.schedule import PREDICTION_TYPES, PredictionType, Schedule

_TOLERANCE = 1e-12


class SamplerError(ValueError):
    """A sampler's numbers that cannot be read, or do not follow from each other; says which."""


@dataclass(frozen=True, kw_only=True)
class StepCoefficients:
    """From t to t_next. All but the two times are float64."""

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
        strengths = {"alpha": alpha, "sigma": sigma, "alpha_next": alpha_next, "sigma_next": sigma_next}
        from_z, from_output = _coefficients(**strengths, prediction_type=prediction_type)
        return cls(t=t, t_next=t_next, **strengths, from_z=from_z, from_output=from_output)


def _coefficients(
    *, alpha: float, sigma: float, alpha_next: float, sigma_next: float, prediction_type: PredictionType
) -> tuple[float, float]:
    if prediction_type == "v_prediction":
        return alpha_next * alpha + sigma_next * sigma, sigma_next * alpha - alpha_next * sigma
    return alpha_next / alpha, sigma_next - alpha_next * sigma / alpha


@dataclass(frozen=True, kw_only=True)
class SamplerCoefficients:
    """A whole walk from noise to the clean end.

    Attributes:
        steps: in their order.
        prediction_type: what the network's output is.
        guidance: the w that the model was made for; another may be asked for.
    """

    steps: tuple[StepCoefficients, ...]
    prediction_type: PredictionType
    guidance: float

    @classmethod
    def of(
        cls, schedule: Schedule, *, grid: Sequence[int], prediction_type: PredictionType, guidance: float
    ) -> Self:
        """The walk down `grid`, as `snapfusion.sampling.time_grid` gives it."""
        steps = tuple(
            StepCoefficients.between(t, t_next, schedule=schedule, prediction_type=prediction_type)
            for t, t_next in pairwise(grid)
        )
        return cls(steps=steps, prediction_type=prediction_type, guidance=guidance)

    def to_values(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"steps": [asdict(step) for step in self.steps]}

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Self:
        """What `to_values` gave, checked: every coefficient has to follow from its alphas and sigmas.

        Raises:
            StepsError: naming what is missing, or the step whose numbers do not belong together.
        """
        try:
            steps = tuple(_parse_step(given) for given in values["steps"])
            made = cls(
                steps=steps,
                prediction_type=values["prediction_type"],
                guidance=float(values["guidance"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise SamplerError(f"the sampler's numbers cannot be read: {error!r}") from None
        if made.prediction_type not in PREDICTION_TYPES or not steps:
            raise SamplerError(f"the sampler has {len(steps)} steps of {made.prediction_type!r}")
        made._check()
        return made

    def _check(self) -> None:
        for number, step in enumerate(self.steps):
            strengths = {name: getattr(step, name) for name in _STRENGTHS}
            wanted = _coefficients(**strengths, prediction_type=self.prediction_type)
            for name, value in zip(("from_z", "from_output"), wanted, strict=True):
                if not math.isclose(getattr(step, name), value, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE):
                    raise SamplerError(
                        f"step {number} (t = {step.t}): {name} is {getattr(step, name)}, but its alphas and "
                        f"sigmas make it {value}"
                    )
        for number, (step, following) in enumerate(pairwise(self.steps)):
            if step.t_next != following.t:
                raise SamplerError(
                    f"step {number} lands at t = {step.t_next}, the next begins at {following.t}"
                )


_STRENGTHS = ("alpha", "sigma", "alpha_next", "sigma_next")


def _parse_step(given: Mapping[str, Any]) -> StepCoefficients:
    strengths = {
        field.name: float(given[field.name]) for field in fields(StepCoefficients) if field.type == "float"
    }
    return StepCoefficients(t=int(given["t"]), t_next=int(given["t_next"]), **strengths)
