"""Settings of latency measurements and of an evolution round."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeInt, PositiveInt

from snapfusion.settings import Settings

Precision = Literal["float32", "float16", "bfloat16"]


Runtime = Literal["torch", "torch-compiled", "executorch-xnnpack"]


class RoundLimits(Settings):
    """How far a round of evolution goes.

    Attributes:
        removed: blocks that go in a round, at most: Alg. 1's group of actions.
        copied: blocks that are copied in a round in which the objective is met.
        growths: rounds that may copy. Alg. 1 has no such bound; it ends when training has converged.
    """

    removed: PositiveInt = 4
    copied: PositiveInt = 1
    growths: NonNegativeInt = 1
