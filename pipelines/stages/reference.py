"""Extracts features of the real images that generated ones are compared with."""

import time

import numpy as np
import torch

from pipelines.rejections import Rejected, Rejection
from pipelines.sources.real_images import read_real_image
from pipelines.stages.device import batch_slices, environment_of, prepare
from pipelines.stages.image import decode_image
from pipelines.stages.metric_networks import FeatureReader
from pipelines.stages.settings import Device, FeatureSettings, ImageBounds
from pipelines.tables.units import FinishedRows, ImageNameRows
from snapfusion.mini.scenes import HELD_OUT, captioned_image

SCENE_PREFIX = "scene:"
"""Before the number of a held-out scene, which is rendered; other names are URLs."""

_BATCH_SIZE = 64


class ExtractFeatures:
    """Turns `ImageNameRows` into `FinishedRows` of REFERENCES; runs in an actor.

    Args:
        features: the network.
        images: bounds on images.
        size: pixels a side of the center square that each image is cropped and resized to.
        device: of the network.
    """

    def __init__(self, *, features: FeatureSettings, images: ImageBounds, size: int, device: Device) -> None:
        self.images = images
        self.size = size
        self.reader = FeatureReader(features, device=prepare(device))
        self.environment = environment_of(device)

    def __call__(self, rows: ImageNameRows) -> FinishedRows:
        """Read all images of a unit and extract features, in batches that depend on the unit alone."""
        began = time.monotonic()
        images: dict[str, np.ndarray] = {}
        rejections: list[Rejection] = []
        for name, ordinal in rows.row_keys():
            try:
                images[name] = self.read_image(name)
            except Rejected as rejected:
                rejections.append(rejected.record(id=name, source=rows.unit.source, ordinal=ordinal))
        return FinishedRows(
            unit=rows.unit,
            columns={"id": list(images), "features": self.extract(list(images.values()))},
            rejections=rejections,
            environment=self.environment,
            seconds=time.monotonic() - began,
        )

    def read_image(self, name: str) -> np.ndarray:
        """The image of that name, uint8 [S,S,3].

        Raises:
            Rejected: if it cannot be decoded.
        """
        if name.startswith(SCENE_PREFIX):
            image, _ = captioned_image(HELD_OUT + int(name.removeprefix(SCENE_PREFIX)))
            return image
        return decode_image(read_real_image(name), size=self.size, settings=self.images)

    def extract(self, images: list[np.ndarray]) -> np.ndarray:
        """Features float32 [n,D] of images uint8 [S,S,3]."""
        pixels = (torch.from_numpy(np.stack(images[span])) for span in batch_slices(len(images), _BATCH_SIZE))
        features = [self.reader.features(batch.permute(0, 3, 1, 2).contiguous()).numpy() for batch in pixels]
        return np.concatenate(features) if features else np.empty((0, 0), np.float32)
