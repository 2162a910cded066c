"""Pictures that generated ones are held against: a name to a picture, a picture to its features."""

from __future__ import annotations

import time

import numpy as np
import torch

from pipelines.rejections import Rejected, Rejection
from pipelines.stages.image import decode_image
from pipelines.stages.metric_networks import FeatureReader
from pipelines.stages.settings import Device, FeatureSettings, ImageBounds
from pipelines.storage.objects import read_bytes
from pipelines.tables.units import FinishedRows, ImageNameRows
from snapfusion.mini.scenes import HELD_OUT, captioned_image

SCENE_PREFIX = "scene:"
"""Before the number of a held-out scene, which is drawn by formula; other names are URLs."""

_BATCH_SIZE = 64


class ExtractFeatures:
    """`ImageNameRows` in, `FinishedRows` of REFERENCES out.

    Args:
        features: which network.
        images: bounds on pictures.
        size: the side of the middle square that each picture is made, in pixels (see `decode_image`).
        device: of the network.
    """

    def __init__(self, *, features: FeatureSettings, images: ImageBounds, size: int, device: Device) -> None:
        self.images = images
        self.size = size
        self.reader = FeatureReader(features, device=device.prepare())
        self.environment = device.environment()

    def __call__(self, rows: ImageNameRows) -> FinishedRows:
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
        if name.startswith(SCENE_PREFIX):
            image, _ = captioned_image(HELD_OUT + int(name.removeprefix(SCENE_PREFIX)))
            return image
        return decode_image(read_bytes(name), size=self.size, settings=self.images)

    def describe(self, pictures: list[np.ndarray]) -> np.ndarray:
        """Features float32 [n,D] of pictures uint8 [S,S,3]."""
        batches = [pictures[start : start + _BATCH_SIZE] for start in range(0, len(pictures), _BATCH_SIZE)]
        described = [
            self.reader.features(torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2).contiguous()).numpy()
            for batch in batches
        ]
        return np.concatenate(described) if described else np.empty((0, 0), np.float32)
