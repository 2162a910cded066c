"""What a request for images may hold, and its bounds."""

from pydantic import Field

from snapfusion.settings import Settings
from snapfusion.solver_names import Solver

MAX_BODY_BYTES = 65_536
"""Of a request."""
MAX_CAPTION_CHARACTERS = 2_000
MAX_IMAGES = 8
"""Of a request."""
MAX_GUIDANCE = 100.0
MAX_SEED = 2**53 - 1
"""The largest whole number up to which JSON numbers of a browser are exact."""


class Limits(Settings):
    """Bounds of what requests may cost.

    Attributes:
        steps: most of an image.
        size: largest side of an image in pixels; None is twice the model's own.
        waiting: requests that may wait while one generates.
    """

    steps: int = Field(100, ge=1)
    size: int | None = Field(None, ge=1)
    waiting: int = Field(8, ge=0)


class ModelOptions(Settings):
    """How one model generates; what is None is the model's own.

    Attributes:
        name: of a model that is served.
        steps: of the sampler.
        sampler: one of `SOLVERS`.
        guidance: w of Eq. 3; 1 is none.
    """

    name: str
    steps: int | None = Field(None, ge=1)
    sampler: Solver | None = None
    guidance: float | None = Field(None, ge=1.0, le=MAX_GUIDANCE)


class ImageRequest(Settings):
    """Images of one caption from one noise.

    Attributes:
        caption: to generate from.
        negative: caption of the unconditional input (Eq. 3); "" is the empty one.
        seed: of the noise, as of `generate`.
        size: side of the images in pixels; None is each model's own.
        models: one for each image, the same one more than once if its options differ; empty for every model.
    """

    caption: str = Field(min_length=1, max_length=MAX_CAPTION_CHARACTERS)
    negative: str = Field("", max_length=MAX_CAPTION_CHARACTERS)
    seed: int = Field(0, ge=0, le=MAX_SEED)
    size: int | None = Field(None, ge=1)
    models: tuple[ModelOptions, ...] = Field((), max_length=MAX_IMAGES)
