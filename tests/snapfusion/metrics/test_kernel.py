"""The kernel distance against its definition, and its estimate's expectation."""

import numpy as np
import pytest
import torch

from snapfusion.metrics.kernel import KernelReference, KernelSums


def features(count, *, seed, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 6, generator=generator) + shift


def sums_of(x, y, *, groups=1):
    reference = KernelReference.of(y) if isinstance(y, torch.Tensor) else y
    return KernelSums.of(x, groups=np.array_split(np.arange(len(x)), groups), reference=reference)


def by_definition(x, y):
    """The unbiased estimate of MMD^2, pair by pair (Gretton et al. 2012, Eq. 3)."""

    def k(a, b):
        return float((a.double() @ b.double() / 6 + 1) ** 3)

    n, m = len(x), len(y)
    same_x = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j)
    same_y = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j)
    across = sum(k(a, b) for a in x for b in y)
    return same_x / (n * (n - 1)) + same_y / (m * (m - 1)) - 2 * across / (n * m)


def test_distance_of_any_groups_is_that_by_definition():
    x, y = features(12, seed=1, shift=0.3), features(20, seed=2)
    sums = sums_of(x, y, groups=3)
    assert sums.distance([0, 1, 2]) == pytest.approx(by_definition(x, y), rel=1e-9)
    assert sums.distance([0, 2]) == pytest.approx(by_definition(torch.cat([x[:4], x[8:]]), y), rel=1e-9)


def test_estimate_is_unbiased():
    """Of equal distributions it is zero on average, where a Frechet distance is above."""
    reference = KernelReference.of(features(400, seed=0))
    estimates = torch.tensor([sums_of(features(40, seed=1 + n), reference).distance([0]) for n in range(200)])
    # One reference for all: its own error is common to the estimates.
    assert abs(float(estimates.mean())) < 0.02
    assert float(estimates.min()) < 0.0
    shifted = sums_of(features(40, seed=1, shift=0.5), reference).distance([0])
    assert shifted > 5 * float(estimates.std())


def test_blocks_do_not_change_the_sum(monkeypatch):
    x, y = features(50, seed=1), features(70, seed=2)
    whole = sums_of(x, y).distance([0])
    monkeypatch.setattr("snapfusion.metrics.kernel._BLOCK", 7)
    assert sums_of(x, y).distance([0]) == pytest.approx(whole, rel=1e-12)


def test_too_few_images_are_refused():
    with pytest.raises(ValueError, match="1 real images have no kernel distance"):
        KernelReference.of(features(1, seed=0))
    sums = sums_of(features(1, seed=0), features(3, seed=1))
    with pytest.raises(ValueError, match="1 images have no kernel distance"):
        sums.distance([0])
