"""One model's images at one guidance scale: their distances to real images, and scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from snapfusion.metrics import intervals
from snapfusion.metrics.image_groups import GroupIndices, ImageGroups
from snapfusion.metrics.intervals import Interval
from snapfusion.metrics.kernel import KernelReference, KernelSums
from snapfusion.metrics.moments import Moments
from snapfusion.metrics.neighbors import NEIGHBORS, NeighborReference, spread_within
from snapfusion.metrics.parallel import Map
from snapfusion.metrics.subset_distances import subset_distances


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageDistances:
    """What is kept of the images' features, from which distances and their intervals follow.

    Attributes:
        frechet: distance of each of the grouping's subsets.
        kernel: sums of the kernel by group; None without a kernel distance.
        diversity: metrics of `neighbors`, by name.
    """

    frechet: Mapping[tuple[int, ...], float]
    kernel: KernelSums | None
    diversity: Mapping[str, Interval]

    @classmethod
    def of(
        cls,
        features: np.ndarray,
        *,
        grouping: ImageGroups,
        reference: Moments,
        kernel: KernelReference | None,
        neighbors: NeighborReference | None = None,
        parallel: Map = map,
    ) -> ImageDistances:
        """The distances of features float32 [N,D].

        KID and neighbours are of as many images as their references have at most, the first of each group.

        Args:
            features: of the images, in order of the grouping.
            grouping: of the images.
            reference: moments of real images' features.
            kernel: of the kernel distance; None for none.
            neighbors: of precision, recall, density and coverage; None for none.
            parallel: computes parts of it.

        Raises:
            ValueError: if the reference has features of another length.
        """
        vectors, sums = torch.from_numpy(features), None
        if kernel is not None:
            first = _first_of_each(grouping, most=len(kernel.features))
            sums = KernelSums.of(vectors, groups=first, reference=kernel, parallel=parallel)
        diversity: dict[str, Interval] = {}
        if neighbors is not None:
            first = _first_of_each(grouping, most=len(neighbors.features))[: grouping.size]
            chosen = vectors[torch.from_numpy(np.concatenate(first))]
            if len(chosen) > NEIGHBORS:
                diversity |= neighbors.compare(chosen, parallel=parallel)
        if grouping.draws > 1:
            diversity["spread_within"] = spread_within(vectors, draws=grouping.draws)
        frechet = subset_distances(features, grouping=grouping, reference=reference, parallel=parallel)
        return cls(frechet=frechet, kernel=sums, diversity=diversity)


def _first_of_each(grouping: ImageGroups, *, most: int) -> list[np.ndarray]:
    """The first images of each group, in a partition `most` images together."""
    each = max(2, most // grouping.size)
    return [group[:each] for group in grouping.members]


@dataclass(frozen=True, kw_only=True, eq=False)
class CurvePoint:
    """One model's images at one guidance scale.

    Attributes:
        w: guidance scale of SnapFusion Eq. 3.
        distances: to real images.
        clip: cosine of each image with its caption, float64 [n]: draw by draw in order of the captions.
        right: attributes that match the caption, 0 or 1 [n,A]; None without an oracle.
        grouping: of the images.
        preferences: further scores of each image with its caption, such as PickScore, by name: float64 [n].
    """

    w: float
    distances: ImageDistances
    clip: np.ndarray
    right: np.ndarray | None
    grouping: ImageGroups
    preferences: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def scores(self) -> dict[str, np.ndarray]:
        """Of each image, float64 [n]: CLIP, preferences and, with an oracle, attributes (their mean, all)."""
        scores = {"clip": self.clip, **self.preferences}
        if self.right is None:
            return scores
        all_right = self.right.all(axis=1).astype(float)
        return scores | {"attributes": self.right.mean(axis=1), "all_attributes": all_right}

    def mean(self, values: np.ndarray) -> Interval:
        """The mean of a value of each image, float64 [n], with an interval over draws, or over captions."""
        draws = self.grouping.draws
        return intervals.mean(values) if draws == 1 else intervals.mean_within(values.reshape(draws, -1))

    def mean_clip(self, groups: GroupIndices) -> float:
        """Mean cosine over the images of these groups."""
        members = self.grouping.members
        return float(np.concatenate([self.clip[members[group]] for group in groups]).mean())
