"""Settings of the miniature's measurements."""

from __future__ import annotations

from pydantic import Field, NonNegativeInt, field_validator

from snapfusion.settings import Settings
from snapfusion.solver_names import Solver

_BATCH = 100
"""Pictures at a time; how many captions the scorer tells apart; and what an interval of a Frechet distance
leaves out at once."""


class MiniMeasurementSettings(Settings):
    """What is measured."""

    seed: int = Field(default=0, ge=0, description="of the noise that pictures are generated from")
    scenes: int = Field(default=2000, ge=2 * _BATCH, multiple_of=_BATCH, description="held-out scenes")
    models: tuple[str, ...] = Field(default=("sd", "sd-v"), description="folders of models that draw them")
    solvers: tuple[Solver, ...] = Field(default=("ddim",), min_length=1)
    steps: tuple[int, ...] = Field(default=(50,), min_length=1, description="network evaluations of a solver")
    guidance: tuple[float, ...] = Field(default=(1.0, 2.0, 3.0), min_length=1)


BATCH = 25
"""Scenes at a time, and what an interval leaves out at once."""


class RobustnessSettings(Settings):
    """How two models are measured.

    Attributes:
        scenes: held-out scenes of a seed.
        seeds: each has noise and scenes of its own.
        steps: of DDIM, from pure noise to a picture.
        guidance: w, with which pictures are drawn.
        noised_to: t, from which details are brought back.
    """

    scenes: int = Field(default=300, ge=2 * BATCH, multiple_of=BATCH)
    seeds: tuple[NonNegativeInt, ...] = Field(default=(0, 1, 2), min_length=1)
    steps: int = Field(default=16, ge=1, le=1000)
    guidance: float = Field(default=2.0, ge=1)
    noised_to: int = Field(default=249, ge=1, le=999)

    @field_validator("seeds")
    @classmethod
    def _different(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("a seed given twice would count twice")
        return seeds
