"""LPIPS between the images of each caption, which are kept in SAMPLES."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from jobs.evaluation.distance_files import FurtherMetric
from jobs.evaluation.settings import LpipsSettings
from pipelines.datasets.samples import read_images
from pipelines.tables.table import Snapshot
from snapfusion.metrics.intervals import Interval, mean
from snapfusion.metrics.lpips import Lpips, load_lpips
from snapfusion.metrics.parallel import Map
from snapfusion.metrics.pinned import hash_of, pinned_file

_AT_ONCE = 16
"""Captions whose images are in memory."""


@dataclass(frozen=True)
class CaptionDiversity:
    """Measures how different the images of one caption are."""

    settings: LpipsSettings

    @cached_property
    def network(self) -> Lpips:
        """The network with its weights."""
        settings = self.settings
        return load_lpips(
            settings.network,
            backbone=pinned_file(settings.backbone, sha256=settings.backbone_sha256),
            heads=pinned_file(settings.heads, sha256=settings.heads_sha256),
        )

    def describe(self) -> dict[str, Any]:
        """What the figure depends on beside the images: network, SHA-256 of its files, captions."""
        settings = self.settings
        files = {
            "backbone": pinned_file(settings.backbone, sha256=settings.backbone_sha256),
            "heads": pinned_file(settings.heads, sha256=settings.heads_sha256),
        }
        hashes = {f"{name}_sha256": hash_of(file) for name, file in files.items()}
        return {"network": settings.network, **hashes, "captions": settings.captions}

    def metric_of(
        self, table: Snapshot, *, source: str, w: float, ids: Sequence[str], draws: int, parallel: Map
    ) -> FurtherMetric:
        """The mean distance of every two images of a caption, over the first captions.

        Args:
            table: SAMPLES with images.
            source: name of the list of captions.
            w: guidance.
            ids: of all images, draw by draw in order of the captions.
            draws: of each caption, at least 2.
            parallel: computes captions.
        """
        by_caption = np.array(ids).reshape(draws, -1).T[: self.settings.captions]

        def measure() -> Interval:
            """The mean and its interval over captions; see `read_images` and `Lpips.pairwise` for errors."""
            distances: list[float] = []
            for start in range(0, len(by_caption), _AT_ONCE):
                part = by_caption[start : start + _AT_ONCE]
                images = read_images(table, source=source, w=w, ids=part.flatten().tolist())
                distances += parallel(self._mean_distance, images.reshape(*part.shape, *images.shape[1:]))
            return mean(distances)

        return FurtherMetric(name="lpips_within", identity=self.describe(), measure=measure)

    def _mean_distance(self, images: np.ndarray) -> float:
        """Of the images of one caption, uint8 [D,H,W,3]."""
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
        return float(self.network.pairwise(pixels).mean(dtype=torch.float64))
