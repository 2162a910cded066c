"""Settings of the loaders."""

from typing import Annotated

from pydantic import Field, PositiveInt

from snapfusion.settings import Settings


class LoaderSettings(Settings):
    """The choice and order of the rows of a training.

    Attributes:
        window_units: units whose rows are shuffled together, over all lanes; each lane has at least one.
            Twice as many are in memory.
        lanes: of which each has units of its own and gives as many rows of a batch. A worker reads the
            units of its lanes; no unit is read by two if the number of workers divides `lanes`, and `lanes`
            the global batch. A single worker reads those of all lanes.
        held_out: fraction of the rows kept for evaluation, chosen by a hash of the row's id.
    """

    window_units: PositiveInt = 8
    lanes: PositiveInt = 1
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.0
