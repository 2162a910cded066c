"""Pictures that generated ones are held against: a name to a picture, a picture to its features."""

from __future__ import annotations

import time

import numpy as np
import torch

from pipelines.rejection import Rejected, Rejection
from pipelines.stages.environment import Device
from pipelines.stages.image import PictureBounds, decode_image
from pipelines.stages.judge import FeatureReader, FeatureSettings
from pipelines.storage import read_bytes
from pipelines.units import FinishedRows, PictureRows
from snapfusion.mini.scenes import HELD_OUT, sample

SCENE = "scene:"
"""Before the number of a held-out scene, which is drawn by formula; other names are URLs."""

_BATCH = 64


class DescribePictures:
    """`PictureRows` in, `FinishedRows` of REFERENCES out.

    Args:
        features: which network.
        images: bounds on pictures.
        size: the side of the middle square that each picture is made, in pixels (see `decode_image`).
        device: of the network.
    """

    def __init__(
        self, *, features: FeatureSettings, images: PictureBounds, size: int, device: Device
    ) -> None:
        self.images = images
        self.size = size
        self.reader = FeatureReader(features, device=device.prepare())
        self.environment = device.environment()

    def __call__(self, rows: PictureRows) -> FinishedRows:
        """Read and describe all pictures of a unit, in batches that depend on the unit alone."""
        began = time.monotonic()
        pictures: dict[str, np.ndarray] = {}
        rejections: list[Rejection] = []
        for position, name in enumerate(rows.names):
            try:
                pictures[name] = self.picture(name)
            except Rejected as verdict:
                ordinal = rows.unit.start + position
                rejections.append(verdict.record(id=name, source=rows.unit.source, ordinal=ordinal))
        return FinishedRows(
            unit=rows.unit,
            columns={"id": list(pictures), "features": self.describe(list(pictures.values()))},
            rejections=rejections,
            environment=self.environment,
            seconds=time.monotonic() - began,
        )

    def picture(self, name: str) -> np.ndarray:
        """The picture of that name, uint8 [S,S,3].

        Raises:
            Rejected: if it cannot be decoded.
        """
        if name.startswith(SCENE):
            image, _ = sample(HELD_OUT + int(name.removeprefix(SCENE)))
            return image
        return decode_image(read_bytes(name), size=self.size, settings=self.images)

    def describe(self, pictures: list[np.ndarray]) -> np.ndarray:
        """Features float32 [n,D] of pictures uint8 [S,S,3]."""
        batches = [pictures[start : start + _BATCH] for start in range(0, len(pictures), _BATCH)]
        described = [
            self.reader.features(torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2).contiguous()).numpy()
            for batch in batches
        ]
        return np.concatenate(described) if described else np.empty((0, 0), np.float32)
