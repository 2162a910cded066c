"""Palettization of weights: one-dimensional k-means over a histogram.

There are at most 65,536 float16 numbers, so tensors of any size are counted first. A Lloyd iteration then
costs k - 1 binary searches, and the same weights give the same palette on every machine, which clusterings
with random initial centers do not.
"""

import numpy as np

MAX_ITERATIONS = 500
"""Of Lloyd's algorithm, which ends as soon as no border moves."""


def palettize(weights: np.ndarray, *, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """A table of 2^bits float16 values, and for each weight the index of the nearest one.

    Args:
        weights: float16, finite, of any shape.
        bits: 1 to 8.

    Returns:
        The table, float16 [2^bits], padded with zeros; the indices, uint8, flat.
    """
    patterns = np.ascontiguousarray(weights).view(np.uint16).ravel()
    counts = np.bincount(patterns, minlength=1 << 16)
    present = np.flatnonzero(counts)
    values = present.astype(np.uint16).view(np.float16).astype(np.float64)
    order = np.argsort(values, kind="stable")
    means, nearest = _kmeans(values[order], counts=counts[present[order]], max_means=1 << bits)
    table = np.zeros(1 << bits, np.float16)
    table[: len(means)] = means
    index_of_pattern = np.zeros(1 << 16, np.uint8)
    index_of_pattern[present[order]] = nearest
    return table, index_of_pattern[patterns]


def _kmeans(values: np.ndarray, *, counts: np.ndarray, max_means: int) -> tuple[np.ndarray, np.ndarray]:
    """Means of sorted values, and the index of the nearest mean for each value."""
    if len(values) <= max_means:
        return values, np.arange(len(values))
    # With cumulative sums a cluster's mean is a difference of two entries, whatever its size.
    mass = np.concatenate([[0.0], np.cumsum(counts, dtype=np.float64)])
    moment = np.concatenate([[0.0], np.cumsum(counts * values)])
    borders = _initial_borders(values, counts=counts, max_means=max_means)
    for _ in range(MAX_ITERATIONS):
        edges = np.concatenate([[0], borders, [len(values)]])
        means = np.diff(moment[edges]) / np.diff(mass[edges])
        moved = _separate(np.searchsorted(values, (means[1:] + means[:-1]) / 2), count=len(values))
        if np.array_equal(moved, borders):
            break
        borders = moved
    # The table holds the rounded means, so the nearest of those is what counts.
    means = np.unique(means.astype(np.float16)).astype(np.float64)
    return means, np.searchsorted((means[1:] + means[:-1]) / 2, values)


def _initial_borders(values: np.ndarray, *, counts: np.ndarray, max_means: int) -> np.ndarray:
    # The optimal density of many levels is the cube root of the weights' density (Panter and Dite, 1951),
    # which between neighbouring values is their count over their distance.
    gaps = np.gradient(values)
    share = np.cumsum(np.cbrt(counts * gaps**2))
    quantiles = np.arange(1, max_means) / max_means * share[-1]
    return _separate(np.searchsorted(share, quantiles) + 1, count=len(values))


def _separate(borders: np.ndarray, *, count: int) -> np.ndarray:
    """Move borders so that no cluster between them is empty."""
    steps = np.arange(1, len(borders) + 1)
    raised = np.maximum.accumulate(np.maximum(borders - steps, 0)) + steps
    return np.minimum(raised, count - steps[::-1])
