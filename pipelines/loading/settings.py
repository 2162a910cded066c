"""Settings of the loaders."""

from typing import Annotated

from pydantic import Field, PositiveInt

from snapfusion.settings import Settings


class LoaderSettings(Settings):
    """The choice and order of the rows of a training.

    Attributes:
        window_units: units whose rows are shuffled together; twice as many are in memory.
        held_out: fraction of the rows kept for evaluation, chosen by a hash of the row's id.
    """

    window_units: PositiveInt = 8
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.0
