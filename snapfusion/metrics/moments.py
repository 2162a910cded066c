"""Count, mean and covariance of feature vectors, in float64, which can be gathered in parts and merged."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Moments:
    """What a Frechet distance needs to know of a set of feature vectors.

    Sums of squares are kept about the mean, never about zero: features whose mean is large beside their
    spread lose no digits, and parts merge as in Chan et al. 1983.

    Attributes:
        count: N, the number of vectors.
        mean: [D] float64.
        scatter: [D,D] float64, the sum over vectors of the outer product of (vector - mean) with itself.
    """

    count: int
    mean: Tensor
    scatter: Tensor

    def __post_init__(self) -> None:
        dimension = len(self.mean)
        if self.mean.shape != (dimension,) or self.scatter.shape != (dimension, dimension):
            raise ValueError(
                f"mean is {tuple(self.mean.shape)} and scatter {tuple(self.scatter.shape)}; [D] and [D,D] "
                "are accepted"
            )
        if self.mean.dtype != torch.float64 or self.scatter.dtype != torch.float64:
            raise ValueError(f"mean is {self.mean.dtype}, scatter {self.scatter.dtype}; float64 is accepted")

    @classmethod
    def of(cls, features: Tensor) -> Self:
        """The moments of the rows of `features`, [N,D] of any floating dtype; N may be 0.

        Raises:
            ValueError: unless there are N rows of D finite floats.
        """
        if features.ndim != 2 or not features.is_floating_point():
            raise ValueError(
                f"features are {features.dtype} {tuple(features.shape)}; floats [N,D] are accepted"
            )
        if not bool(features.isfinite().all()):
            bad = int((~features.isfinite().all(dim=1)).sum())
            raise ValueError(f"{bad} of {len(features)} feature vectors are not finite; leave them out")
        vectors = features.detach().to(device="cpu", dtype=torch.float64)
        mean = vectors.mean(dim=0) if len(vectors) else vectors.new_zeros(vectors.shape[1])
        centred = vectors - mean
        return cls(count=len(vectors), mean=mean, scatter=centred.T @ centred)

    @property
    def dimension(self) -> int:
        """D, the length of a vector."""
        return len(self.mean)

    def merge(self, other: Self) -> Self:
        """The moments of both sets together (Chan et al. 1983).

        Equal to `of` on all rows at once up to float64 rounding: merge in one fixed order where bits matter.

        Raises:
            ValueError: if the vectors have different lengths.
        """
        if self.dimension != other.dimension:
            raise ValueError(f"features of {self.dimension} and of {other.dimension} numbers do not merge")
        count = self.count + other.count
        if count == 0:
            return self
        apart = other.mean - self.mean
        between = torch.outer(apart, apart) * (self.count * other.count / count)
        return type(self)(
            count=count,
            mean=self.mean + apart * (other.count / count),
            scatter=self.scatter + other.scatter + between,
        )

    def covariance(self) -> Tensor:
        """[D,D] float64, the scatter over N - 1 (as `numpy.cov`).

        Raises:
            ValueError: of fewer than two vectors.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 feature vectors, there are {self.count}")
        return self.scatter / (self.count - 1)

    @cached_property
    def covariance_root(self) -> Tensor:
        """The symmetric square root of the covariance, [D,D] float64; what is zero up to rounding is zero.

        Kept once computed: a reference is compared with many sets.
        """
        values, vectors = torch.linalg.eigh(self.covariance())
        rounding = float(values.max()) * len(values) * torch.finfo(values.dtype).eps
        roots = torch.where(values > rounding, values, 0.0).sqrt()
        return (vectors * roots) @ vectors.T

    def shortfall(self) -> str | None:
        """In words, that N vectors of D numbers do not span their space, or None where they can.

        A covariance of N vectors has rank N - 1 at most. Below full rank a Frechet distance can still be
        computed, but says more about N than about the pictures.
        """
        if self.count > self.dimension:
            return None
        return (
            f"{self.count} feature vectors of {self.dimension} numbers: their covariance is singular, and a "
            f"Frechet distance is biased upward; at least {self.dimension + 1} are needed for full rank"
        )
