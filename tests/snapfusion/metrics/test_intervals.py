import numpy as np
import pytest
from scipy import stats

from snapfusion.metrics.intervals import (
    Interval,
    average,
    jackknife,
    mean,
    mean_within,
    over_seeds,
    proportion,
)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (1980, 2000, 0.9846, 0.9935)],
)
def test_proportion_has_wilsons_interval(successes, n, low, high):
    """Against values of Wilson's formula as tabulated (to four places)."""
    interval = proportion(successes, n=n)
    assert interval.value == successes / n
    assert interval.low == pytest.approx(low, abs=5e-5)
    assert interval.high == pytest.approx(high, abs=5e-5)


@pytest.mark.parametrize("p", [0.5, 0.97])
def test_proportion_covers_the_truth_in_95_percent(p):
    draws = np.random.default_rng(0).binomial(300, p, size=2000)
    ends = [proportion(int(k), n=300) for k in draws]
    assert 0.93 < np.mean([interval.low <= p <= interval.high for interval in ends]) < 0.97


def test_mean_covers_the_truth_in_95_percent():
    rows = np.random.default_rng(1).normal(3.0, 2.0, size=(1000, 200))
    covered = np.mean([mean(row).low <= 3.0 <= mean(row).high for row in rows])
    assert 0.93 < covered < 0.97


@pytest.mark.parametrize("count", [8, 20, 50])
def test_jackknife_of_a_mean_is_students_interval(count):
    groups = np.random.default_rng(2).normal(size=count)
    found = jackknife(list(groups), lambda some: float(np.mean(some)))
    half = stats.t.ppf(0.975, count - 1) * groups.std(ddof=1) / np.sqrt(count)
    assert found == pytest.approx((groups.mean(), groups.mean() - half, groups.mean() + half), rel=2e-3)


def test_jackknife_covers_a_ratio():
    """A statistic that is no mean: mean(x) / mean(y), whose true value is 2."""
    generator = np.random.default_rng(3)

    def covers():
        pairs = [(generator.normal(4.0, 1.0, 20), generator.normal(2.0, 0.5, 20)) for _ in range(20)]
        interval = jackknife(pairs, lambda some: float(np.divide(*np.mean(some, axis=(0, 2)))))
        return interval.low <= 2.0 <= interval.high

    assert 0.90 < np.mean([covers() for _ in range(300)]) < 0.98


def test_mean_within_covers_the_mean_of_the_same_captions():
    """Captions differ by far more than draws, and stay as they are: the interval is over draws alone."""
    random = np.random.default_rng(4)
    captions = random.normal(0.0, 10.0, size=50)

    def covers():
        interval = mean_within(captions + random.normal(0.0, 0.1, size=(5, 50)))
        return interval.low <= captions.mean() <= interval.high

    assert 0.93 < np.mean([covers() for _ in range(1000)]) < 0.97
    with pytest.raises(ValueError, match="1 draws for each caption have no interval"):
        mean_within(captions[None])


@pytest.mark.parametrize("seeds", [2, 3, 6])
def test_intervals_over_seeds_cover_the_mean_of_all_seeds(seeds):
    """Seeds vary, and all are measured with one error that is common to them."""
    random = np.random.default_rng(5)

    def covers():
        measured = random.normal(0.0, 1.0) + random.normal(0.0, 2.0, size=seeds)
        interval = over_seeds([Interval(value, value - 1.96, value + 1.96) for value in measured])
        return interval.low <= 0.0 <= interval.high

    assert 0.93 < np.mean([covers() for _ in range(2000)]) < 0.99


def test_an_average_of_the_same_images_is_no_more_certain():
    estimates = [Interval(1.0, 0.0, 2.0), Interval(3.0, 0.0, 6.0)]
    assert average(estimates) == Interval(2.0, 0.0, 4.0)
    assert over_seeds(estimates[:1]) == estimates[0]


@pytest.mark.parametrize("freedom", range(1, 12))
def test_students_quantile(freedom):
    groups = [0.0] * freedom + [float(freedom + 1)]
    interval = jackknife(groups, lambda some: float(np.mean(some)))
    expected = stats.t.ppf(0.975, freedom) * np.std(groups, ddof=1) / np.sqrt(freedom + 1)
    assert interval.high - interval.value == pytest.approx(expected, rel=0.02)


def test_too_few_samples_are_refused():
    with pytest.raises(ValueError, match="3 of 2"):
        proportion(3, n=2)
    with pytest.raises(ValueError, match="1 values have no interval"):
        mean([1.0])
    with pytest.raises(ValueError, match="1 groups have no interval"):
        jackknife([1.0], lambda some: some[0])
