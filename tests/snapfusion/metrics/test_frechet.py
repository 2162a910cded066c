"""Moments against numpy, and Frechet distances against closed forms and scipy's Schur root."""

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from snapfusion.metrics.frechet import frechet_distance
from snapfusion.metrics.moments import Moments


def features_of(rows, dimension, *, seed=0, mean=0.0, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dimension, dimension, generator=generator, dtype=torch.float64) / dimension**0.5
    vectors = torch.randn(rows, dimension, generator=generator, dtype=torch.float64)
    return mean + spread * vectors @ mixing


def with_covariance(covariance, mean=None, count=1000):
    """Moments with exactly this covariance."""
    covariance = torch.as_tensor(covariance, dtype=torch.float64)
    mean = torch.zeros(len(covariance)) if mean is None else torch.as_tensor(mean)
    return Moments(count=count, mean=mean.double(), scatter=covariance * (count - 1))


def along(axes, variances, mean=None):
    """Moments with these variances along the columns of `axes`."""
    return with_covariance(axes @ torch.diag(variances) @ axes.T, mean)


def rotation(dimension, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(dimension, dimension, generator=generator, dtype=torch.float64)).Q


def independent_distance(a, b):
    """The usual implementation: numpy's moments, and scipy's root of the product."""
    a, b = a.double().numpy(), b.double().numpy()
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(cov_a @ cov_b)
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root.real))


def test_moments_equal_numpys():
    features = features_of(50, 7, mean=3.0)
    moments = Moments.of(features)
    assert (moments.count, moments.dimension) == (50, 7)
    np.testing.assert_allclose(moments.mean.numpy(), features.numpy().mean(0), rtol=1e-13)
    expected = np.cov(features.numpy(), rowvar=False)
    np.testing.assert_allclose(moments.covariance().numpy(), expected, rtol=1e-12)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.floats(-1e4, 1e4), st.integers(0, 99))
@settings(deadline=None, max_examples=50)
def test_merged_moments_equal_those_of_all_rows(sizes, mean, seed):
    features = features_of(sum(sizes), 5, seed=seed, mean=mean)
    whole = Moments.of(features)
    merged = Moments.of(features[:0])
    for part in features.split(sizes):
        merged = merged.merge(Moments.of(part))
    assert merged.count == whole.count
    np.testing.assert_allclose(merged.mean.numpy(), whole.mean.numpy(), rtol=1e-12, atol=1e-11)
    np.testing.assert_allclose(merged.scatter.numpy(), whole.scatter.numpy(), rtol=1e-9, atol=1e-8)


def test_a_large_mean_costs_no_digits():
    """Sums of squares about zero would lose 14 of float64's 16 digits here."""
    small, far = Moments.of(features_of(200, 4)), Moments.of(features_of(200, 4) + 1e7)
    np.testing.assert_allclose(far.covariance().numpy(), small.covariance().numpy(), rtol=1e-7)


def test_float32_features_are_summed_in_float64():
    features = features_of(300, 6, mean=100.0).float()
    assert torch.equal(Moments.of(features).scatter, Moments.of(features.double()).scatter)


def test_equal_sets_are_at_distance_zero():
    moments = Moments.of(features_of(200, 16))
    assert frechet_distance(moments, moments) == pytest.approx(0.0, abs=1e-12)


def test_covariances_that_commute_have_a_closed_form():
    q = rotation(8)
    a, b = torch.linspace(0.5, 4, 8, dtype=torch.float64), torch.linspace(3, 0.1, 8, dtype=torch.float64)
    mean = torch.arange(8.0)
    expected = float(mean.square().sum() + (a.sqrt() - b.sqrt()).square().sum())
    assert frechet_distance(along(q, a), along(q, b, mean)) == pytest.approx(expected, rel=1e-13)


def test_covariances_without_full_rank_have_a_closed_form():
    """Those that commute and share two of their directions; and two lines at an angle in the plane."""
    q = rotation(6)
    a = torch.tensor([4.0, 1.0, 9.0, 0, 0, 0], dtype=torch.float64)
    b = torch.tensor([0, 1.0, 4.0, 16.0, 0, 0], dtype=torch.float64)
    assert frechet_distance(along(q, a), along(q, b)) == pytest.approx(4 + 0 + 1 + 16, rel=1e-12)

    # One direction u with variance p, another v with variance r: the root's trace is sqrt(p r) |u.v|.
    u, v = q[0], (0.6 * q[0] + 0.8 * q[1])
    found = frechet_distance(with_covariance(4 * torch.outer(u, u)), with_covariance(9 * torch.outer(v, v)))
    assert found == pytest.approx(4 + 9 - 2 * 6 * 0.6, rel=1e-12)


def test_distance_to_a_single_point():
    point, cloud = Moments.of(torch.ones(5, 3)), Moments.of(features_of(100, 3) + 1.0)
    expected = float(cloud.covariance().trace() + (cloud.mean - 1.0).square().sum())
    assert frechet_distance(point, cloud) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("rows", "dimension"), [(2000, 64), (300, 128), (129, 128)])
def test_an_independent_implementation_agrees(rows, dimension):
    a, b = features_of(rows, dimension), features_of(rows, dimension, seed=1, mean=0.1, spread=1.3)
    found = frechet_distance(Moments.of(a), Moments.of(b))
    assert found == pytest.approx(independent_distance(a, b), rel=1e-6)


def test_closed_form_below_full_rank():
    """With fewer rows than dimensions the root follows from the rows' inner products."""
    a, b = features_of(40, 128), features_of(50, 128, seed=1, mean=0.1)
    centred_a, centred_b = (x - x.mean(0) for x in (a, b))
    root = np.linalg.svd((centred_a @ centred_b.T).numpy(), compute_uv=False).sum() / (39 * 49) ** 0.5
    spread = centred_a.square().sum() / 39 + centred_b.square().sum() / 49 - 2 * root
    expected = float((a.mean(0) - b.mean(0)).square().sum() + spread)
    assert frechet_distance(Moments.of(a), Moments.of(b)) == pytest.approx(expected, rel=1e-9)


def test_rank_warning_of_small_sets():
    assert Moments.of(features_of(9, 8)).rank_warning() is None
    assert "at least 9" in Moments.of(features_of(8, 8)).rank_warning()


THREE, FOUR = Moments.of(torch.ones(2, 3)), Moments.of(torch.ones(2, 4))


@pytest.mark.parametrize(
    ("compute", "message"),
    [
        (lambda: THREE.merge(FOUR), "of 3 and of 4 numbers do not merge"),
        (lambda: frechet_distance(THREE, FOUR), "of 3 and of 4 numbers have no distance"),
        (lambda: frechet_distance(Moments.of(torch.ones(1, 3)), THREE), "at least 2 .* there are 1"),
        (lambda: Moments.of(torch.tensor([[1.0, 2.0], [torch.nan, 0.0]])), "1 of 2 .* not finite"),
        (lambda: Moments.of(torch.ones(2, 3, dtype=torch.int64)), r"floats \[N,D\]"),
    ],
)
def test_unusable_features_are_refused(compute, message):
    with pytest.raises(ValueError, match=message):
        compute()
