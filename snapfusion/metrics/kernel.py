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

_BLOCK = 1_000
"""Rows of the kernel matrix that are computed at once."""


def polynomial_kernel(a: Tensor, b: Tensor) -> Tensor:
    """(x y / D + 1)^3 of all rows x of a, float64 [N,D], and y of b, float64 [M,D]: [N,M]."""
    return (a @ b.T / a.shape[1] + 1.0).pow(3)


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
    def of(cls, features: Tensor) -> KernelReference:
        """The reference of features [M,D] of any floating dtype.

        Raises:
            ValueError: of fewer than two rows.
        """
        if len(features) < 2:
            raise ValueError(f"{len(features)} real images have no kernel distance; at least 2 are needed")
        features = features.to(torch.float64)
        everything = torch.ones(1, len(features), dtype=torch.float64)
        return cls(features=features, within=float(_sums_within(features, everything)))


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
    def of(cls, features: Tensor, *, groups: Sequence[np.ndarray], reference: KernelReference) -> KernelSums:
        """The sums of groups of rows, given by their indices, of features [N,D] of any floating dtype."""
        features = features.to(torch.float64)
        members = torch.zeros(len(groups), len(features), dtype=torch.float64)
        for row, group in zip(members, groups, strict=True):
            row[torch.from_numpy(group)] = 1.0
        blocks = features.split(_BLOCK)
        across = torch.cat([polynomial_kernel(block, reference.features).sum(dim=1) for block in blocks])
        return cls(
            counts=tuple(map(len, groups)),
            within=_sums_within(features, members),
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


def _sums_within(features: Tensor, members: Tensor) -> Tensor:
    """Sums over pairs of different rows by group, [G,G], of features [N,D] and 0 or 1 by group, [G,N]."""
    sums = torch.zeros(len(members), len(members), dtype=torch.float64)
    for start in range(0, len(features), _BLOCK):
        block = features[start : start + _BLOCK]
        kernel = polynomial_kernel(block, features)
        kernel[:, start : start + _BLOCK].fill_diagonal_(0.0)
        sums += members[:, start : start + _BLOCK] @ kernel @ members.T
    return sums
