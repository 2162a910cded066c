"""Stages that die on one image or unit; no torch in here, so that a worker that dies is soon back."""

import hashlib
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
from synthetic_units import finished

from pipelines.rejections import Rejected
from pipelines.stages.fingerprint import ImageHashes, image_hashes
from pipelines.stages.image import decode_image
from pipelines.stages.read import ReadShard
from pipelines.stages.settings import ImageBounds, ImageSettings
from pipelines.tables.units import FinishedRows


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


class LooksKilledBy(KilledBy):
    """`image_hashes` likewise."""

    def __call__(self, data: bytes) -> ImageHashes:
        super().__call__(data)
        return image_hashes(data, images=ImageBounds(min_side=8))


class PoisonedReader(ReadShard):
    """`ReadShard` with such a decoder."""

    def __init__(self, *, poison: str, **arguments: Any) -> None:
        super().__init__(**arguments)
        [(size, _)] = arguments["shapes"]
        self.decode = KilledBy(poison, size=size)


class CrashingStage:
    """Makes four rows from the ordinal of the first; is killed by ordinal 4, and leaves a mark each time."""

    def __init__(self, *, marks: str) -> None:
        self.marks = Path(marks)

    def __call__(self, start: int) -> FinishedRows:
        if start == 4:
            with self.marks.open("a") as marks:
                marks.write("x")
            os.kill(os.getpid(), signal.SIGKILL)
        return finished(start, start + 4, final=False)


def set_aside(start: int) -> FinishedRows:
    """A substitute for a unit that no worker survives."""
    unit = finished(start, start + 4, final=False).unit
    crashed = [
        Rejected("crashed").record(id=f"s/{n}", source="s", ordinal=n) for n in range(start, start + 4)
    ]
    names = ("id", "source_id", "caption", "token_ids", "latent")
    return FinishedRows(unit=unit, columns={name: [] for name in names}, rejections=crashed)
