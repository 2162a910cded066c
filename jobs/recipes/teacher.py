"""Facts about a recipe's model on which other settings depend, read from its configurations."""

import math
from dataclasses import dataclass

from jobs.training.sources import RECIPE_MODEL, VPRED_MODEL

_ROWS_AT_512 = 8


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """What settings depend on of a model.

    Attributes:
        model: its source.
        side: of its images, in pixels.
        v_model: source of the model that predicts v: itself, or what `jobs.finetune_vpred` makes of it.
    """

    model: str
    side: int
    v_model: str

    @property
    def micro_batch(self) -> int:
        """Rows of one forward pass: 8 at 512 px, else the power of two with about as many pixels, 1 to 64."""
        rows = _ROWS_AT_512 * (512 / self.side) ** 2
        return int(2 ** max(0, min(round(math.log2(rows)), 6)))


def read_teacher(model: str) -> Teacher:
    """Read the facts from a model's configurations; its weights are not read.

    Raises:
        ModelError: if there is no such model.
    """
    # Only for models of one's own: importing torch takes seconds.
    from snapfusion.models.load import load_prediction_type, load_sizes

    predicts_v = load_prediction_type(model) == "v_prediction"
    return Teacher(
        model=model, side=load_sizes(model).side, v_model=RECIPE_MODEL if predicts_v else VPRED_MODEL
    )
