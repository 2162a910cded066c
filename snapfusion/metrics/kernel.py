"""The kernel distance between two sets of features: KID where they are Inception's (Binkowski et al. 2018).

Sums of the kernel are kept for each group of images, so that the distance of any groups together takes no
further pass over the images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from snapfusion.metrics.parallel import Map

_BLOCK = 1_000
"""Rows of the kernel matrix that are computed at once."""


def polynomial_kernel(a: Tensor, b: Tensor) -> Tensor:
    """(x y / D + 1)^3 of all rows x of a, float64 [N,D], and y of b, float64 [M,D]: [N,M]."""
    return (a @ b.T).div_(a.shape[1]).add_(1.0).pow_(3)


@dataclass(frozen=True, kw_only=True, eq=False)
class KernelReference:
    """Features of real images.

    Attributes:
        features: float64 [M,D].
        within: the kernel's sum over pairs of different images.
    """

    features: Tensor
    within: float

    @classmethod
    def of(cls, features: Tensor, *, parallel: Map = map) -> KernelReference:
        """The reference of features [M,D] of any floating dtype.

        Args:
            features: of the images.
            parallel: computes blocks of the kernel.

        Raises:
            ValueError: of fewer than two rows.
        """
        if len(features) < 2:
            raise ValueError(f"{len(features)} real images have no kernel distance; at least 2 are needed")
        features = features.to(torch.float64)
        everything = torch.ones(1, len(features), dtype=torch.float64)
        return cls(features=features, within=float(_sums_within(features, everything, parallel=parallel)))


@dataclass(frozen=True, kw_only=True, eq=False)
class KernelSums:
    """The kernel's sums over groups of images.

    Attributes:
        counts: images of each group.
        within: sums over pairs of a row's group and a column's, without an image beside itself, [G,G].
        across: sums over pairs of each group and the reference, [G].
        reference: of the real images.
    """

    counts: tuple[int, ...]
    within: Tensor
    across: Tensor
    reference: KernelReference

    @classmethod
    def of(
        cls,
        features: Tensor,
        *,
        groups: Sequence[np.ndarray],
        reference: KernelReference,
        parallel: Map = map,
    ) -> KernelSums:
        """The sums of groups of rows, given by their indices, of features [N,D] of any floating dtype.

        Raises:
            ValueError: if the features are of another length than the reference's.
        """
        if features.shape[1] != reference.features.shape[1]:
            lengths = f"{features.shape[1]} and of {reference.features.shape[1]}"
            raise ValueError(f"features of {lengths} numbers have no kernel distance")
        # Rows of no group would cost most of the time.
        rows, positions = np.unique(np.concatenate(groups), return_inverse=True)
        features = features[torch.from_numpy(rows)].to(torch.float64)
        members = torch.zeros(len(groups), len(features), dtype=torch.float64)
        edges = np.cumsum([len(group) for group in groups])[:-1]
        for row, group in zip(members, np.split(positions, edges), strict=True):
            row[torch.from_numpy(group)] = 1.0
        blocks = features.split(_BLOCK)
        across = torch.cat(
            [*parallel(lambda block: polynomial_kernel(block, reference.features).sum(dim=1), blocks)]
        )
        return cls(
            counts=tuple(map(len, groups)),
            within=_sums_within(features, members, parallel=parallel),
            across=members @ across,
            reference=reference,
        )

    def distance(self, groups: Sequence[int]) -> float:
        """The unbiased estimate of the squared distance of these groups' images; may be below zero.

        Args:
            groups: without an image in common.

        Raises:
            ValueError: of fewer than two images.
        """
        chosen = torch.tensor(list(groups))
        n, m = sum(self.counts[group] for group in groups), len(self.reference.features)
        if n < 2:
            raise ValueError(f"{n} images have no kernel distance; at least 2 are needed")
        within = float(self.within[chosen][:, chosen].sum()) / (n * (n - 1))
        real = self.reference.within / (m * (m - 1))
        return within + real - 2.0 * float(self.across[chosen].sum()) / (n * m)


def _sums_within(features: Tensor, members: Tensor, *, parallel: Map) -> Tensor:
    """Sums over pairs of different rows by group, [G,G], of features [N,D] and 0 or 1 by group, [G,N]."""

    def sums_from(start: int) -> Tensor:
        """Of the pairs of a row of this block and one of this or a later block."""
        stop = min(start + _BLOCK, len(features))
        kernel = polynomial_kernel(features[start:stop], features[start:])
        kernel[:, : stop - start].fill_diagonal_(0.0)
        here, later = members[:, start:stop], members[:, stop:]
        both_ways = here @ kernel[:, stop - start :] @ later.T
        return here @ kernel[:, : stop - start] @ here.T + both_ways + both_ways.T

    return torch.stack([*parallel(sums_from, range(0, len(features), _BLOCK))]).sum(dim=0)
