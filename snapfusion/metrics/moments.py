"""Mergeable count, mean and covariance of feature vectors, in float64."""

from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Moments:
    """The moments of a set of feature vectors, as needed for a Frechet distance.

    Sums of squares are about the mean, not about zero: features whose mean is large relative to their spread
    lose no digits, and parts merge as in Chan et al. 1983.

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
        for name, shape in (("mean", (dimension,)), ("scatter", (dimension, dimension))):
            tensor = getattr(self, name)
            if tensor.shape != shape or tensor.dtype != torch.float64:
                raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}; float64 {shape} is needed")

    @classmethod
    def of(cls, features: Tensor) -> Self:
        """The moments of the rows of `features`, [N,D] of any floating dtype; N may be 0.

        Raises:
            ValueError: unless there are N rows of D finite floats.
        """
        check_features(features)
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

        Equal to `of` on all rows at once up to float64 rounding; merge in a fixed order for identical bits.

        Raises:
            ValueError: if the vectors have different lengths.
        """
        if self.dimension != other.dimension:
            raise ValueError(f"features of {self.dimension} and of {other.dimension} numbers do not merge")
        count = self.count + other.count
        if count == 0:
            return self
        shift = other.mean - self.mean
        between = torch.outer(shift, shift) * (self.count * other.count / count)
        return type(self)(
            count=count,
            mean=self.mean + shift * (other.count / count),
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
    def covariance_factor(self) -> Tensor:
        """L, lower triangular [D,D] float64, where L L^T is the covariance; kept for reuse."""
        factor, failed = torch.linalg.cholesky_ex(self.covariance())
        if not failed:
            return factor
        # Cholesky's algorithm needs full rank. Of any rank is V s^(1/2) = L Q^T, its factor by eigenvalues.
        values, vectors = torch.linalg.eigh(self.covariance())
        # Eigenvalues that are zero up to rounding may come out negative.
        rounding = float(values.max()) * len(values) * torch.finfo(values.dtype).eps
        roots = torch.where(values > rounding, values, 0.0).sqrt()
        return torch.linalg.qr((vectors * roots).T).R.T.contiguous()

    def rank_warning(self) -> str | None:
        """A warning that N vectors of D numbers do not span their space; None if they can.

        A covariance of N vectors has rank N - 1 at most. Below full rank a Frechet distance can be computed,
        but says more about N than about the images.
        """
        if self.count > self.dimension:
            return None
        return (
            f"{self.count} feature vectors of {self.dimension} numbers: their covariance is singular, and a "
            f"Frechet distance is biased upward; at least {self.dimension + 1} are needed for full rank"
        )


def check_features(features: Tensor) -> None:
    """Raise `ValueError` unless features are [N,D] finite floats."""
    if features.ndim != 2 or not features.is_floating_point():
        raise ValueError(f"features are {features.dtype} {[*features.shape]}; floats [N,D] are needed")
    if num_bad := int((~features.isfinite().all(dim=1)).sum()):
        raise ValueError(f"{num_bad} of {len(features)} feature vectors are not finite; leave them out")
