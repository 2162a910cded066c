"""Groups of images that intervals leave out: of captions, or with one draw of each caption."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

_PARTITIONS = 6
"""Ways to put the draws into groups, over which an interval's variance is averaged."""

GroupIndices = Sequence[int]
"""Groups of images that a statistic is computed over."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageGroups:
    """Partitions of the same images into groups.

    Attributes:
        members: indices of each group's images; several partitions of all images stand one after the other.
        size: groups of each partition.
        draws: images of each caption; with more than one, a group has one of each.
    """

    members: tuple[np.ndarray, ...]
    size: int
    draws: int

    @classmethod
    def of(cls, images: int, *, groups: int, draws: int) -> ImageGroups:
        """The groups of images that stand draw by draw; the same for all models.

        Args:
            images: their number.
            groups: of captions, contiguous; not used with several draws.
            draws: images of each caption.

        Raises:
            ValueError: unless there are two groups or more, and two images or more for each.
        """
        groups = groups if draws == 1 else draws
        if groups < 2 or images < 2 * groups:
            raise ValueError(f"{images} images in {groups} groups; at least 2 groups of 2 are needed")
        return _groups_of(images, groups=groups, draws=draws)

    @property
    def partitions(self) -> Sequence[range]:
        """The groups of each partition of all images."""
        return [range(start, start + self.size) for start in range(0, len(self.members), self.size)]

    @functools.cached_property
    def subsets(self) -> tuple[tuple[int, ...], ...]:
        """Groups whose statistics intervals need: of all images, and without one group or (of draws) two."""
        at_once = (1, 2) if self.draws > 1 and self.size > 2 else (1,)
        return (
            tuple(self.partitions[0]),
            *(
                tuple(group for group in partition if group not in left_out)
                for partition in self.partitions
                for count in at_once
                for left_out in combinations(partition, count)
            ),
        )


@functools.cache
def _groups_of(images: int, *, groups: int, draws: int) -> ImageGroups:
    if draws == 1:
        parts = np.array_split(np.arange(images), groups)
        return ImageGroups(members=tuple(parts), size=groups, draws=1)
    # The first partition is draw by draw, in the others each caption's draws are permuted.
    by_draw = np.arange(images).reshape(draws, images // draws)
    random = np.random.default_rng(0)
    others = (random.permuted(by_draw, axis=0) for _ in range(_PARTITIONS - 1))
    members = tuple(group for partition in (by_draw, *others) for group in partition)
    return ImageGroups(members=members, size=groups, draws=draws)
