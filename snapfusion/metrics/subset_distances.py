"""Frechet distances of subsets of the same images to one reference, by subtraction of what is left out.

The covariance of a subset follows from sums over groups of images, and these are taken after the images are
multiplied by the reference's factor L: a subset's L^T C L, whose eigenvalues the distance needs
(`snapfusion.metrics.frechet`), then takes no product of matrices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from snapfusion.metrics.frechet import trace_of_root
from snapfusion.metrics.image_groups import ImageGroups
from snapfusion.metrics.moments import Moments, check_features
from snapfusion.metrics.parallel import Map

_BLOCK = 256
"""Columns of the blocks in which triangular matrices are kept and multiplied: of 2,048 9/16 of the whole."""

_ROWS = 500
"""Images that are converted to float64 at once."""


def subset_distances(
    features: np.ndarray, *, grouping: ImageGroups, reference: Moments, parallel: Map
) -> dict[tuple[int, ...], float]:
    """The Frechet distance of each of the grouping's subsets, as `frechet_distance` has it.

    Memory: 9/16 of a float64 [D,D] for each group of a partition, and two [D,D] for each core.

    Args:
        features: of all images, float32 [N,D].
        grouping: of the images.
        reference: moments of real images' features.
        parallel: computes groups and subsets.

    Raises:
        ValueError: if the features are of another length than the reference's, or not finite.
    """
    vectors = torch.from_numpy(features)
    check_features(vectors)
    if vectors.shape[1] != reference.dimension:
        raise ValueError(
            f"features of {vectors.shape[1]} and of {reference.dimension} numbers have no distance"
        )
    space = ReferenceSpace(
        origin=vectors.mean(dim=0, dtype=torch.float64),
        reference=reference,
        variance=float(reference.covariance().trace()),
    )
    distances: dict[tuple[int, ...], float] = {}
    for partition in grouping.partitions:
        # One allocation, so that memory is given back after each point.
        products = torch.zeros(len(partition), packed_size(vectors.shape[1]), dtype=torch.float64)
        groups = zip(
            (torch.from_numpy(grouping.members[group]) for group in partition), products, strict=True
        )
        sums = list(parallel(partial(space.sums, vectors), groups))
        whole = GroupSums(
            count=sum(one.count for one in sums),
            total=torch.stack([one.total for one in sums]).sum(dim=0),
            square=sum(one.square for one in sums),
            products=products.sum(dim=0),
        )
        subsets = [subset for subset in grouping.subsets if subset[0] in partition]
        left_out = (
            [one for group, one in zip(partition, sums, strict=True) if group not in subset]
            for subset in subsets
        )
        values = parallel(partial(space.distance, whole), left_out)
        distances |= zip(subsets, values, strict=True)
    return distances


@dataclass(frozen=True, kw_only=True, eq=False)
class GroupSums:
    """Sums over a group's images x about an origin, which add and subtract.

    Attributes:
        count: of images.
        total: sum of x, [D].
        square: sum of |x|^2.
        products: sum of (L^T x) (L^T x)^T, [D,D]: its lower triangle, packed by `_unpacked`.
    """

    count: int
    total: Tensor
    square: float
    products: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class ReferenceSpace:
    """The reference, as subsets need it.

    Attributes:
        origin: about which sums are taken, [D].
        reference: real images.
        variance: trace of their covariance.
    """

    origin: Tensor
    reference: Moments
    variance: float

    def sums(self, features: Tensor, group: tuple[Tensor, Tensor]) -> GroupSums:
        """The sums over a group of features [N,D].

        Args:
            features: of all images.
            group: rows of its images, and zeros to which the packed products are added.
        """
        rows, products = group
        factor, blocks = self.reference.covariance_factor, list(_blocks(features.shape[1]))
        total, square = torch.zeros_like(self.origin), 0.0
        for part in rows.split(_ROWS):
            x = features[part].double() - self.origin
            total += x.sum(dim=0)
            square += float(x.square().sum())
            # L is lower triangular: a block of its columns begins with zeros.
            y = torch.cat([x[:, block.start :] @ factor[block.start :, block] for block in blocks], dim=1)
            for block, packed in _unpacked(products, y.shape[1]):
                packed.addmm_(y[:, block.start :].T, y[:, block])
        return GroupSums(count=len(rows), total=total, square=square, products=products)

    def distance(self, whole: GroupSums, without: Sequence[GroupSums]) -> float:
        """The distance of the images of `whole` but those of `without`."""
        count = whole.count - sum(one.count for one in without)
        mean = (whole.total - sum(one.total for one in without)) / count
        square = whole.square - sum(one.square for one in without) - count * float(mean.square().sum())
        product = torch.zeros(len(mean), len(mean), dtype=torch.float64)
        for one, add in ((whole, torch.Tensor.add_), *((one, torch.Tensor.sub_) for one in without)):
            for block, packed in _unpacked(one.products, len(mean)):
                add(product[block.start :, block], packed)
        moved = self.reference.covariance_factor.T @ mean
        product.addr_(moved, moved, alpha=-count).div_(count - 1)
        spread = square / (count - 1) + self.variance - 2.0 * trace_of_root(product)
        return max(0.0, float((self.origin + mean - self.reference.mean).square().sum()) + spread)


def _blocks(width: int) -> Iterator[slice]:
    """Blocks of the columns of a square matrix."""
    return (slice(start, min(start + _BLOCK, width)) for start in range(0, width, _BLOCK))


def packed_size(width: int) -> int:
    """Numbers of a packed lower triangle, about 9/16 of a square matrix of 2,048 columns."""
    return sum((width - block.start) * (block.stop - block.start) for block in _blocks(width))


def _unpacked(packed: Tensor, width: int) -> Iterator[tuple[slice, Tensor]]:
    """Each block of columns of a packed lower triangle, and its values from the diagonal down, as a view."""
    start = 0
    for block in _blocks(width):
        height, columns = width - block.start, block.stop - block.start
        yield block, packed[start : start + height * columns].view(height, columns)
        start += height * columns
