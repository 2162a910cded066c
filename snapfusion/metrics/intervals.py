"""95 % confidence intervals of proportions, means and other statistics.

They account for the samples of one evaluation only, not for the variation between training seeds.
"""

import math
from collections.abc import Callable, Sequence
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


def _symmetric(value: float, half: float) -> Interval:
    return Interval(value, value - half, value + half)


def _student_quantile(freedom: int) -> float:
    """Student's 97.5 % quantile, by Cornish and Fisher's series (Abramowitz and Stegun 1964, 26.7.5).

    Within 2 % from 3 degrees of freedom on, 0.1 % from 7.
    """
    z = _Z
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))
