"""Settings of latency measurements and of evolution rounds; importable without torch."""

from typing import Literal

from pydantic import NonNegativeInt, PositiveInt

from snapfusion.settings import Settings

Precision = Literal["float32", "float16", "bfloat16"]
Runtime = Literal["torch", "torch-compiled", "executorch-xnnpack"]
"""A backend of `snapfusion.evolution.runtimes`."""
DeviceRuntime = Literal["executorch-xnnpack", "coreml"]
"""A runtime of the programs that another device times."""

DEVICE_PRECISION: dict[DeviceRuntime, Precision] = {"executorch-xnnpack": "float32", "coreml": "float16"}
"""Of the programs for each runtime."""


class RoundLimits(Settings):
    """Limits of a round of evolution.

    Attributes:
        removed: maximum number of blocks to remove in a round: the group of actions in Alg. 1.
        copied: number of blocks to copy in a round that meets the objective.
        growths: number of rounds that may copy. Alg. 1 has no such limit; it ends when training converges.
    """

    removed: PositiveInt = 4
    copied: PositiveInt = 1
    growths: NonNegativeInt = 1
