"""Cost of an evaluation to its driver: distances of every point's images to the real ones.

A point is a contender at one guidance (`snapfusion.metrics.curve_point`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from jobs.evaluation.settings import EvaluationSettings, PromptSettings
from pipelines.costs.stage import DriverCost, Work
from pipelines.datasets.costs import CAPTION_BYTES
from pipelines.datasets.settings import ReferencesSettings
from snapfusion.metrics.image_groups import ImageGroups
from snapfusion.metrics.subset_distances import packed_size

_FLOAT32, _FLOAT64 = 4, 8


def distances_cost(settings: EvaluationSettings) -> DriverCost:
    """Cost of all distances: those of the captions, those for tuning, and those of the floor."""
    own = _Comparison(settings=settings, prompts=settings.prompts, references=settings.references)
    comparisons, works = [own], [*own.works(), *own.works_of_floor()]
    if (tuning := settings.tuning) is not None:
        comparisons.append(replace(own, prompts=tuning.prompts, references=tuning.references))
        works += comparisons[-1].works()
    return DriverCost(
        works=tuple(work for work in works if work.units),
        max_cores=max(len(one.grouping.subsets) for one in comparisons),
        peak_bytes=max(one.peak_bytes for one in comparisons),
        core_bytes=own.core_bytes,
    )


@dataclass(frozen=True, kw_only=True)
class _Comparison:
    """Images of one set of captions by all contenders, beside real images."""

    settings: EvaluationSettings
    prompts: PromptSettings
    references: ReferencesSettings

    @property
    def images(self) -> int:
        """Images of a point."""
        return self.prompts.num_images

    @property
    def real(self) -> int:
        """Number of real images."""
        return self.prompts.limit if self.references.paired else self.references.count

    @property
    def width(self) -> int:
        """Length of a feature vector."""
        return self.settings.samples.judging.feature_count

    @property
    def grouping(self) -> ImageGroups:
        """Groups of as few images as there can be: how many there are does not depend on that."""
        draws = self.prompts.draws
        groups = self.settings.groups if draws == 1 else draws
        return ImageGroups.of(2 * groups, groups=groups, draws=draws)

    def works(self) -> Iterator[Work]:
        """Works on the real images, and then on every point."""
        kernel, neighbors = self._chosen(self.real)
        yield self._reading(self.real + kernel + (0 if neighbors == kernel else neighbors))
        yield self._summing(self.real, alone=True)
        yield self._pairing(kernel**2 / 2 + neighbors**2)
        grouping, points, (ours, compared) = (
            self.grouping,
            self.settings.num_points,
            self._chosen(self.images),
        )
        yield self._reading(points * self.images)
        yield self._summing(points * self.images * len(grouping.partitions))
        yield self._measuring(points * len(grouping.subsets))
        # The kernel of two images of one side is the same in either order.
        pairs = ours**2 / 2 + ours * kernel + compared**2 + compared * neighbors
        yield self._pairing(points * pairs)

    def works_of_floor(self) -> Iterator[Work]:
        """Works on further real images, as many as a point has in each set."""
        redraws = self.settings.floor_redraws
        if self.references.url or redraws < 2:
            return
        kernel, _ = self._chosen(self.real)
        yield self._reading(redraws * self.images)
        yield self._summing(redraws * self.images, alone=True)
        yield self._measuring(redraws, alone=True)
        pairs = self.images**2 / 2 + self.images * kernel if kernel else 0
        yield self._pairing(redraws * pairs, alone=True)

    def _chosen(self, images: int) -> tuple[int, int]:
        """How many of so many images KID and neighbours are of."""
        return min(self.settings.kid_images, images), min(self.settings.neighbor_images, images)

    def _reading(self, images: float) -> Work:
        return Work(kind="read_features", units=images * self.width / 1e6, replicated=True)

    def _summing(self, images: float, *, alone: bool = False) -> Work:
        return Work(kind="sum_features", units=images, gmacs=self.width**2 / 1e9, replicated=alone)

    def _measuring(self, subsets: float, *, alone: bool = False) -> Work:
        return Work(kind="subset_distance", units=subsets, gmacs=self.width**3 / 1e9, replicated=alone)

    def _pairing(self, pairs: float, *, alone: bool = False) -> Work:
        return Work(kind="image_pair", units=pairs, gmacs=self.width / 1e9, replicated=alone)

    @property
    def peak_bytes(self) -> float:
        """Memory without what each core takes."""
        square, vector = self.width**2 * _FLOAT64, self.width * _FLOAT64
        kernel, neighbors = (images * vector for images in self._chosen(self.real))
        # The scatter of the real images and its factor.
        real = 2 * square + (kernel if kernel == neighbors else kernel + neighbors)
        scores = self.images * (self.settings.num_points * _FLOAT64 + CAPTION_BYTES)
        # The sums of each group and of all; before them, for the mean, all features in float64.
        sums = (self.grouping.size + 1) * packed_size(self.width) * _FLOAT64
        return real + scores + self.images * self.width * _FLOAT32 + max(sums, self.images * vector)

    @property
    def core_bytes(self) -> float:
        """Memory for a subset's matrix, and for the copy of which its eigenvalues are computed."""
        return 2 * self.width**2 * _FLOAT64
