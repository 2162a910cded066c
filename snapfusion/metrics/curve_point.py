"""One model's images at one guidance scale: their distances to real images, and scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from snapfusion.metrics import intervals
from snapfusion.metrics.image_groups import GroupIndices, ImageGroups
from snapfusion.metrics.intervals import Interval
from snapfusion.metrics.kernel import KernelReference, KernelSums
from snapfusion.metrics.moments import Moments
from snapfusion.metrics.parallel import Map
from snapfusion.metrics.subset_distances import subset_distances


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageDistances:
    """What is kept of the images' features, from which distances and their intervals follow.

    Attributes:
        frechet: distance of each of the grouping's subsets.
        kernel: sums of the kernel by group; None without a kernel distance.
    """

    frechet: Mapping[tuple[int, ...], float]
    kernel: KernelSums | None

    @classmethod
    def of(
        cls,
        features: np.ndarray,
        *,
        grouping: ImageGroups,
        reference: Moments,
        kernel: KernelReference | None,
        parallel: Map = map,
    ) -> ImageDistances:
        """The distances of features float32 [N,D]; KID's of as many images as there are real ones at most.

        Args:
            features: of the images, in order of the grouping.
            grouping: of the images.
            reference: moments of real images' features.
            kernel: of the kernel distance; None for none.
            parallel: computes parts of it.

        Raises:
            ValueError: if the reference has features of another length.
        """
        sums = None
        if kernel is not None:
            most = max(2, len(kernel.features) // grouping.size)
            first = [group[:most] for group in grouping.members]
            sums = KernelSums.of(
                torch.from_numpy(features), groups=first, reference=kernel, parallel=parallel
            )
        frechet = subset_distances(features, grouping=grouping, reference=reference, parallel=parallel)
        return cls(frechet=frechet, kernel=sums)


@dataclass(frozen=True, kw_only=True, eq=False)
class CurvePoint:
    """One model's images at one guidance scale.

    Attributes:
        w: guidance scale of SnapFusion Eq. 3.
        distances: to real images.
        clip: cosine of each image with its caption, float64 [n]: draw by draw in order of the captions.
        right: attributes that match the caption, 0 or 1 [n,A]; None without an oracle.
        grouping: of the images.
    """

    w: float
    distances: ImageDistances
    clip: np.ndarray
    right: np.ndarray | None
    grouping: ImageGroups

    @property
    def scores(self) -> dict[str, np.ndarray]:
        """Of each image, float64 [n]: CLIP, and with an oracle the matching attributes (mean, and all)."""
        if self.right is None:
            return {"clip": self.clip}
        all_right = self.right.all(axis=1).astype(float)
        return {"clip": self.clip, "attributes": self.right.mean(axis=1), "all_attributes": all_right}

    def mean(self, values: np.ndarray) -> Interval:
        """The mean of a value of each image, float64 [n], with an interval over draws, or over captions."""
        draws = self.grouping.draws
        return intervals.mean(values) if draws == 1 else intervals.mean_within(values.reshape(draws, -1))

    def mean_clip(self, groups: GroupIndices) -> float:
        """Mean cosine over the images of these groups."""
        members = self.grouping.members
        return float(np.concatenate([self.clip[members[group]] for group in groups]).mean())
