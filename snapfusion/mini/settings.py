"""Settings of the miniature's evaluations."""

from pydantic import Field, NonNegativeInt, field_validator

from snapfusion.mini.split import Split
from snapfusion.settings import Settings
from snapfusion.solver_names import Solver

BATCH = 100
"""Images per batch; the captions that the scorer chooses from; the size of a jackknife group."""

ROBUSTNESS_BATCH = 25
"""Scenes per batch, and the size of a jackknife group."""


class MiniMeasurementSettings(Settings):
    """Settings of `snapfusion.mini.measure`."""

    seed: int = Field(default=0, ge=0, description="of the noise that images are generated from")
    scenes: int = Field(default=2000, ge=2 * BATCH, multiple_of=BATCH, description="held-out scenes")
    split: Split | None = Field(default="test", description="of the captions; null takes all")
    models: tuple[str, ...] = Field(default=("sd", "sd-v"), description="folders of the measured models")
    solvers: tuple[Solver, ...] = Field(default=("ddim",), min_length=1)
    steps: tuple[int, ...] = Field(default=(50,), min_length=1, description="network evaluations of a solver")
    guidance: tuple[float, ...] = Field(default=(1.0, 2.0, 3.0), min_length=1)


class RobustnessSettings(Settings):
    """Settings of `snapfusion.mini.robustness`.

    Attributes:
        scenes: held-out scenes per seed.
        seeds: each has noise and scenes of its own.
        steps: of DDIM, from pure noise to an image.
        guidance: w of the generated images.
        noised_to: t, from which details are restored.
    """

    scenes: int = Field(default=300, ge=2 * ROBUSTNESS_BATCH, multiple_of=ROBUSTNESS_BATCH)
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
