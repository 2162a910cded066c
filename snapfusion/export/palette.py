"""The few values that stand for many weights: k-means in one dimension, over a histogram.

There are 65,536 float16 numbers at most, so tensors of any size are first counted. Lloyd's iteration then
costs no more than a search for the k - 1 borders in what is left, and the same weights give the same palette
on every machine, which clusterings with random starts do not.
"""

from __future__ import annotations

import numpy as np

MAX_ITERATIONS = 500
"""Of Lloyd's iteration, at most; it ends as soon as no border moves."""


def palettize(weights: np.ndarray, *, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """2^bits float16 values and, for each weight, which of them is nearest.

    Args:
        weights: float16, finite, of any shape.
        bits: 1 to 8.

    Returns:
        The values, float16 [2^bits], zeros after the last that is used; the indices, uint8, flat.
    """
    patterns = np.ascontiguousarray(weights).view(np.uint16).ravel()
    counts = np.bincount(patterns, minlength=1 << 16)
    present = np.flatnonzero(counts)
    values = present.astype(np.uint16).view(np.float16).astype(np.float64)
    order = np.argsort(values, kind="stable")
    found, of_sorted = _kmeans(values[order], counts=counts[present[order]], most=1 << bits)
    table = np.zeros(1 << bits, np.float16)
    table[: len(found)] = found
    of_pattern = np.zeros(1 << 16, np.uint8)
    of_pattern[present[order]] = of_sorted
    return table, of_pattern[patterns]


def _kmeans(values: np.ndarray, *, counts: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """At most that many means of sorted values, and to which of them each value belongs."""
    if len(values) <= most:
        return values, np.arange(len(values))
    mass = np.concatenate([[0.0], np.cumsum(counts, dtype=np.float64)])
    moment = np.concatenate([[0.0], np.cumsum(counts * values)])
    borders = _initial_borders(values, counts=counts, most=most)
    for _ in range(MAX_ITERATIONS):
        edges = np.concatenate([[0], borders, [len(values)]])
        means = np.diff(moment[edges]) / np.diff(mass[edges])
        moved = _separate(np.searchsorted(values, (means[1:] + means[:-1]) / 2), count=len(values))
        if np.array_equal(moved, borders):
            break
        borders = moved
    # The rounded means are what is looked up, so each value goes to the nearest of those.
    means = np.unique(means.astype(np.float16)).astype(np.float64)
    return means, np.searchsorted((means[1:] + means[:-1]) / 2, values)


def _initial_borders(values: np.ndarray, *, counts: np.ndarray, most: int) -> np.ndarray:
    # Many levels are best as dense as the cube root of the weights' density (Panter and Dite, 1951), which
    # between neighbours is their count over their distance.
    gaps = np.gradient(values)
    share = np.cumsum(np.cbrt(counts * gaps**2))
    return _separate(np.searchsorted(share, np.arange(1, most) / most * share[-1]) + 1, count=len(values))


def _separate(borders: np.ndarray, *, count: int) -> np.ndarray:
    """Borders moved so that none of the clusters between them is empty."""
    steps = np.arange(1, len(borders) + 1)
    raised = np.maximum.accumulate(np.maximum(borders - steps, 0)) + steps
    return np.minimum(raised, count - steps[::-1])
