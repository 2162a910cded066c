"""95 % confidence intervals of proportions, means and other statistics.

All but `over_seeds` account for the samples of one evaluation only, not for the variation between training
seeds.
"""

import math
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import NamedTuple, TypeVar

import numpy as np

_Z = 1.959963984540054
"""The normal distribution's 97.5 % quantile."""

_Group = TypeVar("_Group")


class Interval(NamedTuple):
    """An estimate and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def proportion(successes: int, *, n: int) -> Interval:
    """The proportion `successes` / n with Wilson's interval (Wilson 1927), which stays within [0, 1].

    Raises:
        ValueError: unless 0 <= successes <= n and n >= 1.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"{successes} of {n} is no proportion; 0 <= successes <= n and n >= 1 are needed")
    p = successes / n
    middle = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
    # At 0 and 1 rounding can put the estimate itself just outside its interval.
    return Interval(p, min(p, middle - half), max(p, middle + half))


def mean(values: Sequence[float] | np.ndarray) -> Interval:
    """The mean of independent values and its normal interval; for paired comparisons pass the differences.

    Raises:
        ValueError: for fewer than two values.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.size < 2:
        raise ValueError(f"{array.size} values have no interval; at least 2 are needed")
    half = _Z * float(array.std(ddof=1)) / math.sqrt(array.size)
    return _symmetric(float(array.mean()), half)


def mean_within(values: np.ndarray) -> Interval:
    """The mean of several draws for each caption, and its normal interval over draws of the same captions.

    Args:
        values: float [D,C], D independent draws of each of C captions.

    Raises:
        ValueError: for fewer than two draws.
    """
    array = np.asarray(values, dtype=np.float64)
    draws, captions = array.shape
    if draws < 2:
        raise ValueError(f"{draws} draws for each caption have no interval; at least 2 are needed")
    variance = float(array.var(axis=0, ddof=1).sum()) / (draws * captions**2)
    return _symmetric(float(array.mean()), _Z * math.sqrt(variance))


def average(estimates: Sequence[Interval]) -> Interval:
    """The mean of estimates from the same images, whose errors may be the same: its interval is as wide."""
    return _symmetric(float(np.mean([estimate.value for estimate in estimates])), _mean_half_width(estimates))


def over_seeds(estimates: Sequence[Interval]) -> Interval:
    """The mean of estimates of several training seeds, with an interval over seeds and images.

    Student's interval of the seeds' estimates, widened by the mean interval of one: all seeds are evaluated
    with the same captions and noise, whose part in the error does not shrink with more seeds.
    """
    values = np.array([estimate.value for estimate in estimates])
    half = _mean_half_width(estimates)
    if (count := len(values)) > 1:
        spread = _student_quantile(count - 1) * float(values.std(ddof=1)) / math.sqrt(count)
        half = math.hypot(half, spread)
    return _symmetric(float(values.mean()), half)


def jackknife(groups: Sequence[_Group], estimate: Callable[[Sequence[_Group]], float]) -> Interval:
    """`estimate` of all groups; its interval by leaving out one at a time (Efron and Tibshirani 1993).

    For statistics that are no mean, such as a Fréchet distance, which a bootstrap would bias upward. The
    interval is Student's, with one degree of freedom less than there are groups.

    Args:
        groups: independent parts of the samples, of equal size.
        estimate: the statistic of some of them.

    Raises:
        ValueError: for fewer than two groups.
    """
    count = len(groups)
    if count < 2:
        raise ValueError(f"{count} groups have no interval; at least 2 are needed")
    left_out = np.array([estimate([*groups[:i], *groups[i + 1 :]]) for i in range(count)])
    error = math.sqrt((count - 1) / count * float(((left_out - left_out.mean()) ** 2).sum()))
    return _symmetric(estimate(groups), _student_quantile(count - 1) * error)


def jackknife_draws(
    partitions: Sequence[Sequence[_Group]], estimate: Callable[[Sequence[_Group]], float]
) -> Interval:
    """`estimate` of all images, with an interval over draws of the same captions.

    The jackknife's variance is averaged over partitions. Where a statistic is dominated by its square terms,
    as a Frechet distance near its floor is, that is up to twice the true one: the part of pairs of groups is
    subtracted (Efron and Stein 1981).

    Args:
        partitions: of all images, each into groups with one image of every caption.
        estimate: the statistic of some groups of one partition.
    """
    whole = estimate(partitions[0])
    variances, corrections = zip(
        *(_jackknife_variance(groups, whole, estimate) for groups in partitions), strict=True
    )
    variance, correction = float(np.mean(variances)), float(np.mean(corrections))
    # The linear and the square part are not negative, and the jackknife counts the square one twice.
    return _symmetric(whole, _Z * math.sqrt(max(variance - correction, variance / 2.0)))


def _jackknife_variance(
    groups: Sequence[_Group], whole: float, estimate: Callable[[Sequence[_Group]], float]
) -> tuple[float, float]:
    """The jackknife's variance, and what it is too large by, from leaving out two groups at a time."""
    n = len(groups)

    def without(*left_out: int) -> float:
        return estimate([group for index, group in enumerate(groups) if index not in left_out])

    single = np.array([without(i) for i in range(n)])
    variance = (n - 1) / n * float(((single - single.mean()) ** 2).sum())
    if n == 2:
        return variance, 0.0
    pairs = [
        n * whole - (n - 1) * (single[i] + single[j]) + (n - 2) * without(i, j)
        for i, j in combinations(range(n), 2)
    ]
    return variance, float(np.square(pairs).sum()) / n**2


def _mean_half_width(estimates: Sequence[Interval]) -> float:
    return float(np.mean([(estimate.high - estimate.low) / 2 for estimate in estimates]))


def _symmetric(value: float, half: float) -> Interval:
    return Interval(value, value - half, value + half)


def _student_quantile(freedom: int) -> float:
    """Student's 97.5 % quantile, by Cornish and Fisher's series (Abramowitz and Stegun 1964, 26.7.5).

    Exact for 1 and 2 degrees of freedom, where the series is too low; within 2 % from 3 on, 0.1 % from 7.
    """
    if freedom == 1:
        return math.tan(math.pi * 0.475)
    if freedom == 2:
        return 0.95 * math.sqrt(2.0 / (1.0 - 0.95**2))
    z = _Z
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))
