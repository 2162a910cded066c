"""The Frechet distance between two sets of features: FID where they are Inception's. SnapFusion Sec. 5."""

import torch

from snapfusion.metrics.moments import Moments


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), not negative (Heusel et al. 2017).

    `Moments.rank_warning` reports sets that are too small for a meaningful distance.

    Raises:
        ValueError: if the features' lengths differ, or a set has fewer than two vectors.
    """
    if a.dimension != b.dimension:
        raise ValueError(f"features of {a.dimension} and of {b.dimension} numbers have no distance")
    # tr((C_a C_b)^(1/2)) is the sum of the singular values of C_a^(1/2) C_b^(1/2). That is real for
    # covariances of any rank and exact to float64 rounding; the usual Schur root of C_a C_b needs an offset
    # on the diagonal.
    overlap = torch.linalg.svdvals(a.covariance_root @ b.covariance_root).sum()
    spread = a.covariance().trace() + b.covariance().trace() - 2.0 * overlap
    return max(0.0, float((a.mean - b.mean).square().sum() + spread))
