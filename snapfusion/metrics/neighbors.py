"""Precision, recall, density and coverage of generated images by nearest neighbours among features.

An image's sphere reaches to its k-th nearest neighbour of the same side. Precision is the share of generated
images in the sphere of a real one, recall that of real images in the sphere of a generated one
(Kynkaanniemi et al. 2019); density counts the real spheres that hold a generated image, over k, and coverage
is the share of real images whose sphere holds a generated one (Naeem et al. 2020).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from snapfusion.metrics import intervals
from snapfusion.metrics.intervals import Interval
from snapfusion.metrics.parallel import Map

NEIGHBORS = 5
"""k, as Naeem et al. have it."""

_BLOCK = 1_000
"""Rows whose distances are computed at once."""


@dataclass(frozen=True, kw_only=True, eq=False)
class NeighborReference:
    """Features of real images.

    Attributes:
        features: float64 [M,D].
        radii: squared, of each image's sphere, [M].
    """

    features: Tensor
    radii: Tensor

    @classmethod
    def of(cls, features: Tensor, *, parallel: Map = map) -> NeighborReference:
        """The reference of features [M,D] of any floating dtype.

        Raises:
            ValueError: of k rows or fewer.
        """
        features = features.to(torch.float64)
        return cls(features=features, radii=_squared_radii(features, parallel))

    def compare(self, features: Tensor, *, parallel: Map = map) -> dict[str, Interval]:
        """The four metrics of features [N,D] of generated images.

        Intervals are over the images of the side that is counted, with all spheres as they are.

        Raises:
            ValueError: of k rows or fewer, or of another length than the reference's.
        """
        if features.shape[1] != self.features.shape[1]:
            lengths = f"{features.shape[1]} and of {self.features.shape[1]}"
            raise ValueError(f"features of {lengths} numbers have no neighbours in common")
        features = features.to(torch.float64)
        radii = _squared_radii(features, parallel)

        def of_block(block: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            """Of some real images: the generated ones in their spheres, and whether they are in one."""
            rows = self.features[block]
            squares = _squared_distances(rows, features)
            inside = squares <= self.radii[block, None]
            return inside.sum(dim=0), inside.any(dim=1), (squares <= radii[None, :]).any(dim=1)

        counts, covered, recalled = zip(
            *parallel(of_block, torch.arange(len(self.features)).split(_BLOCK)), strict=True
        )
        spheres = torch.stack(counts).sum(dim=0)
        real, generated = len(self.features), len(features)
        return {
            "precision": intervals.proportion(int((spheres > 0).sum()), n=generated),
            "recall": intervals.proportion(int(torch.cat(recalled).sum()), n=real),
            "density": intervals.mean(spheres.double().numpy() / NEIGHBORS),
            "coverage": intervals.proportion(int(torch.cat(covered).sum()), n=real),
        }


def spread_within(features: Tensor, *, draws: int) -> Interval:
    """The variance of features over draws of the same caption, summed over features, mean over captions.

    Args:
        features: [N,D], draw by draw in order of the captions.
        draws: of each caption, at least 2.
    """
    by_draw = features.to(torch.float64).view(draws, len(features) // draws, -1)
    return intervals.mean(by_draw.var(dim=0, correction=1).sum(dim=1).numpy())


def _squared_radii(features: Tensor, parallel: Map) -> Tensor:
    """The squared distance of each row to its k-th nearest other row, [N]."""
    if len(features) <= NEIGHBORS:
        raise ValueError(
            f"{len(features)} images have no {NEIGHBORS} neighbours each; at least {NEIGHBORS + 1} are needed"
        )

    def of_block(block: Tensor) -> Tensor:
        squares = _squared_distances(features[block], features)
        squares[torch.arange(len(block)), block] = torch.inf  # a row is no neighbour of itself
        return squares.kthvalue(NEIGHBORS, dim=1).values

    return torch.cat([*parallel(of_block, torch.arange(len(features)).split(_BLOCK))])


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    squares = a.square().sum(dim=1)[:, None] + b.square().sum(dim=1)[None, :]
    return squares.addmm_(a, b.T, alpha=-2.0).clamp_(min=0.0)
