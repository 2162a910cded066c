"""The Frechet distance between two sets of features: FID where they are Inception's. SnapFusion Sec. 5."""

import torch
from torch import Tensor

from snapfusion.metrics.moments import Moments


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), not negative (Heusel et al. 2017).

    `Moments.rank_warning` reports sets that are too small for a meaningful distance. The factor of b's
    covariance is kept, so several sets are best compared with one b.

    Raises:
        ValueError: if the features' lengths differ, or a set has fewer than two vectors.
    """
    if a.dimension != b.dimension:
        raise ValueError(f"features of {a.dimension} and of {b.dimension} numbers have no distance")
    # With L L^T = C_b the matrix L^T C_a L is symmetric and has the eigenvalues of C_a C_b. They are real for
    # covariances of any rank; the usual Schur root of C_a C_b needs an offset on the diagonal.
    factor = b.covariance_factor
    overlap = trace_of_root(factor.T @ a.covariance() @ factor)
    spread = float(a.covariance().trace() + b.covariance().trace()) - 2.0 * overlap
    return max(0.0, float((a.mean - b.mean).square().sum()) + spread)


def trace_of_root(product: Tensor) -> float:
    """tr(P^(1/2)) of a symmetric P, [D,D] float64 without negative eigenvalues, by its lower triangle."""
    values = torch.linalg.eigvalsh(product)
    # What is zero up to rounding would count with its root, which is far larger.
    rounding = float(values[-1]) * len(values) ** 0.5 * torch.finfo(values.dtype).eps
    return float(values[values > rounding].sqrt().sum())
