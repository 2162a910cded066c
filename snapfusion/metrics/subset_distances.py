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

_ROWS = 2_000
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
    space = _ReferenceSpace(
        origin=vectors.mean(dim=0, dtype=torch.float64),
        reference=reference,
        variance=float(reference.covariance().trace()),
    )
    distances: dict[tuple[int, ...], float] = {}
    for partition in grouping.partitions:
        members = (torch.from_numpy(grouping.members[group]) for group in partition)
        sums = list(parallel(partial(space.sums, vectors), members))
        whole = _total(sums)
        subsets = [subset for subset in grouping.subsets if subset[0] in partition]
        left_out = (
            [one for group, one in zip(partition, sums, strict=True) if group not in subset]
            for subset in subsets
        )
        values = parallel(partial(space.distance, whole), left_out)
        distances |= zip(subsets, values, strict=True)
    return distances


@dataclass(frozen=True, kw_only=True, eq=False)
class _Sums:
    """Sums over images x about an origin, which add and subtract.

    Attributes:
        count: of images.
        total: sum of x, [D].
        square: sum of |x|^2.
        products: sum of (L^T x) (L^T x)^T, [D,D]: its lower triangle by blocks of columns.
    """

    count: int
    total: Tensor
    square: float
    products: tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class _ReferenceSpace:
    """The reference, as subsets need it.

    Attributes:
        origin: about which sums are taken, [D].
        reference: real images.
        variance: trace of their covariance.
    """

    origin: Tensor
    reference: Moments
    variance: float

    def sums(self, features: Tensor, rows: Tensor) -> _Sums:
        """The sums over some rows of features [N,D]."""
        return _total([self._sums_of(features[part].double()) for part in rows.split(_ROWS)])

    def _sums_of(self, features: Tensor) -> _Sums:
        factor, x = self.reference.covariance_factor, features - self.origin
        # L is lower triangular: a block of its columns begins with zeros.
        y = torch.cat([x[:, part.start :] @ factor[part.start :, part] for part in _blocks(x)], dim=1)
        return _Sums(
            count=len(x),
            total=x.sum(dim=0),
            square=float(x.square().sum()),
            products=tuple(y[:, part.start :].T @ y[:, part] for part in _blocks(y)),
        )

    def distance(self, whole: _Sums, without: Sequence[_Sums]) -> float:
        """The distance of the images of `whole` but those of `without`."""
        count = whole.count - sum(one.count for one in without)
        mean = (whole.total - sum(one.total for one in without)) / count
        square = whole.square - sum(one.square for one in without) - count * float(mean.square().sum())
        product = torch.zeros(len(mean), len(mean), dtype=torch.float64)
        for number, part in enumerate(_blocks(product)):
            block = product[part.start :, part]
            block += whole.products[number]
            for one in without:
                block -= one.products[number]
        moved = self.reference.covariance_factor.T @ mean
        product.addr_(moved, moved, alpha=-count).div_(count - 1)
        spread = square / (count - 1) + self.variance - 2.0 * trace_of_root(product)
        return max(0.0, float((self.origin + mean - self.reference.mean).square().sum()) + spread)


def _total(sums: Sequence[_Sums]) -> _Sums:
    if len(sums) == 1:
        return sums[0]
    products = [part.clone() for part in sums[0].products]
    for one in sums[1:]:
        for block, other in zip(products, one.products, strict=True):
            block.add_(other)
    return _Sums(
        count=sum(one.count for one in sums),
        total=torch.stack([one.total for one in sums]).sum(dim=0),
        square=sum(one.square for one in sums),
        products=tuple(products),
    )


def _blocks(matrix: Tensor) -> Iterator[slice]:
    """Blocks of the matrix's columns."""
    width = matrix.shape[1]
    return (slice(start, min(start + _BLOCK, width)) for start in range(0, width, _BLOCK))
