"""The random draws of a batch's rows, made before the step that reads them.

Noise of SD's latents takes a third of a millisecond a row on a CPU core. A loader's thread makes it while the
step before runs. A draw is a function of its row and the step, so it is the same wherever it is made.
"""

from typing import Protocol, runtime_checkable

from snapfusion.training.batch import Batch


@runtime_checkable
class DrawingObjective(Protocol):
    """An objective whose random draws can be made beforehand."""

    def draw(self, batch: Batch, *, step: int) -> Batch:
        """Return the batch with the draws of its rows at a step as further columns, on the CPU.

        A batch that has them is returned as it is. Called in another thread than the objective, which makes
        those that a batch lacks, so it changes no state.
        """


def draw_rows(objective: object, batch: Batch, *, step: int) -> Batch:
    """The batch with the draws of an objective, if it can make them beforehand."""
    return objective.draw(batch, step=step) if isinstance(objective, DrawingObjective) else batch
