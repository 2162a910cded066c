"""Stages that die on one image or unit, in a module that worker processes can import."""

from __future__ import annotations

import hashlib
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.stages.generate import GeneratePairs
from pipelines.stages.image import ImageSettings, decode_image
from pipelines.stages.read import ReadShard
from pipelines.units import CaptionRows, FinishedRows


def poison_of(image: bytes) -> str:
    return hashlib.sha256(image).hexdigest()


class KilledBy:
    """`decode_image`, but the process is killed by the image of this hash."""

    def __init__(self, poison: str, *, size: int) -> None:
        self.poison = poison
        self.size = size

    def __call__(self, data: bytes) -> np.ndarray:
        if poison_of(data) == self.poison:
            os.kill(os.getpid(), signal.SIGSEGV)
        return decode_image(data, size=self.size, settings=ImageSettings(min_side=8))


class PoisonedReader(ReadShard):
    """`ReadShard` with such a decoder."""

    def __init__(self, *, poison: str, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.decode = KilledBy(poison, size=arguments["size"])


class CrashingTeacher(GeneratePairs):
    """A teacher that is killed by the unit that starts at row 4, and leaves a mark each time."""

    def __init__(self, *, tries: str, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.tries = Path(tries)

    def __call__(self, rows: CaptionRows) -> FinishedRows:
        if rows.unit.start == 4:
            with self.tries.open("a") as marks:
                marks.write("x")
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(rows)
