"""Deals windows of rows to lanes, each of which gives a row in turn."""

import heapq

import numpy as np


class Lanes:
    """Windows dealt to lanes: the next window goes to the lane that ends first.

    Lanes that end early get the last rows of those that end late, so that all give equally many. With one
    lane the windows follow each other.

    Attributes:
        rows: of all windows.
        until: the position from which on no row of a window comes: int64, one for each window.

    Args:
        rows: of each window, in their order: int64.
        lanes: their number.
    """

    def __init__(self, rows: np.ndarray, *, lanes: int) -> None:
        self.rows, self._lanes = int(rows.sum()), lanes
        lane, before = _deal(rows, lanes=lanes)
        owned = np.bincount(lane, weights=rows, minlength=lanes).astype(np.int64)
        given = (self.rows + lanes - 1 - np.arange(lanes)) // lanes
        # Rows get numbers that rise within a lane, and from lane to lane.
        self._owned, self._begins = owned, _starts(owned)
        self._missing_begins = _starts(np.maximum(given - owned, 0))
        spare = np.maximum(owned - given, 0)
        self._spare_ends = np.cumsum(spare)
        # What the number of a spare row is above its count among all spare rows, by the lane that owns it.
        self._spare_offset = self._begins + given - _starts(spare)
        self._windows = np.lexsort((before, lane))
        self._ends = np.cumsum(rows[self._windows])
        self._firsts = self._ends - rows[self._windows]
        last = (before + rows - 1) * lanes + lane
        self.until = np.where(before + rows > given[lane], self.rows, last + 1)

    def rows_at(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Lane, window and number within the window of the rows at positions `start` .. `stop` - 1."""
        turn, lane = np.divmod(np.arange(start, stop), self._lanes)
        number = self._begins[lane] + turn
        missing = np.flatnonzero(turn >= self._owned[lane])
        if missing.size:
            spare = self._missing_begins[lane[missing]] + turn[missing] - self._owned[lane[missing]]
            owner = np.searchsorted(self._spare_ends, spare, side="right")
            number[missing] = spare + self._spare_offset[owner]
        at = np.searchsorted(self._ends, number, side="right")
        return lane, self._windows[at], number - self._firsts[at]


def _deal(rows: np.ndarray, *, lanes: int) -> tuple[np.ndarray, np.ndarray]:
    """The lane of each window, and how many rows the lane has before it."""
    ends = [(0, lane) for lane in range(lanes)]
    dealt = np.empty((len(rows), 2), np.int64)
    for window, count in enumerate(rows.tolist()):
        end, lane = ends[0]
        dealt[window] = lane, end
        heapq.heapreplace(ends, (end + count, lane))
    return dealt[:, 0], dealt[:, 1]


def _starts(counts: np.ndarray) -> np.ndarray:
    return np.cumsum(counts) - counts
