"""The order in which training reads rows: a function of the seed and the position, and of nothing else.

    epoch ─ its units, shuffled ─ windows of a few units, dealt to lanes ─ the rows of a window, shuffled
          ─ global batches, a row of each lane in turn

Epochs follow each other without a seam: a batch may end one and begin the next. A restart at any position
reads nothing of what came before it. The rows of a batch are dealt to the ranks by lane, and by file within a
lane, so that each file is read by few of them: by one, if the number of ranks divides that of lanes, and that
the rows of a batch.
"""

import bisect
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from pipelines.loading.lanes import Lanes
from snapfusion.noise import noise_key

SPAN_WINDOWS: Final = 64
"""Windows of a lane after which all lanes begin anew; part of the order, so it never changes."""
_BLOCK_ROWS: Final = 4096
"""Rows that are looked up at once."""

ROW: Final = np.dtype([(name, np.int64) for name in ("lane", "window", "turn", "unit", "row", "until")])
"""A row in the order: its lane; window, counted over all epochs; turn of its unit in the window; unit; number
among the unit's rows that are trained on; and the position from which on no row of the window comes."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """Units whose rows are shuffled among themselves.

    Attributes:
        units: their indices, in the order in which they are read.
        key: of the shuffle.
    """

    units: tuple[int, ...]
    key: int

    def row_indices(self, sizes: np.ndarray) -> np.ndarray:
        """Turn, unit and row of each of its rows in their order: int64 [rows, 3], for units of `sizes` rows.

        The turn is the unit's index in `units`; the row counts only those that are trained on.
        """
        units = np.asarray(self.units, dtype=np.int64)
        ends = np.cumsum(sizes[units])
        shuffled = permutation(self.key, int(ends[-1]))
        turn = np.searchsorted(ends, shuffled, side="right")
        return np.stack([turn, units[turn], shuffled - (ends - sizes[units])[turn]], axis=1)


@dataclass(frozen=True, kw_only=True)
class Span:
    """Windows that are dealt to lanes together.

    Attributes:
        number: of its first window, counted over all epochs.
        start: position of its first row, counted over all epochs.
        window_rows: rows of each window: int64.
        window: makes a window, by its index in the span.
    """

    number: int
    start: int
    window_rows: np.ndarray
    window: Callable[[int], Window]

    def blocks(self, begin: int, *, unit_rows: np.ndarray, lanes: int) -> Iterator[np.ndarray]:
        """The rows from its row `begin` on, in pieces: `ROW` [any].

        Args:
            begin: counted from the span's first row.
            unit_rows: rows of each unit: int64.
            lanes: their number.
        """
        dealt = Lanes(self.window_rows, lanes=lanes)
        shuffled: dict[int, np.ndarray] = {}
        for position in range(begin, dealt.rows, _BLOCK_ROWS):
            lane, window, number = dealt.rows_at(position, min(position + _BLOCK_ROWS, dealt.rows))
            block = np.empty(len(lane), ROW)
            block["lane"], block["window"] = lane, self.number + window
            block["until"] = self.start + dealt.until[window]
            by_window = np.argsort(window, kind="stable")
            cuts = np.flatnonzero(np.diff(window[by_window])) + 1
            for at in np.split(by_window, cuts):
                which = int(window[at[0]])
                if which not in shuffled:
                    shuffled[which] = self.window(which).row_indices(unit_rows)
                rows = shuffled[which][number[at]]
                block["turn"][at], block["unit"][at], block["row"][at] = rows.T
            yield block
            shuffled = {which: rows for which, rows in shuffled.items() if dealt.until[which] > position}


class Epoch:
    """The windows of an epoch, in spans of a few windows for each lane.

    Args:
        number: of the epoch.
        rows: of each unit.
        window_units: units of a window.
        lanes: their number.
        seed: of all shuffles.
    """

    def __init__(self, number: int, rows: np.ndarray, *, window_units: int, lanes: int, seed: int) -> None:
        self._number, self._rows, self._seed = number, rows, seed
        self._window_units, self._lanes = window_units, lanes
        # Units are shuffled as well as rows: neighbours in a source tend to be alike.
        self._units = permutation(noise_key("units", seed, number), len(rows))
        self._firsts = np.arange(0, len(rows), window_units)
        self._window_rows = np.add.reduceat(rows[self._units], self._firsts)
        count = max(1, len(self._firsts) // (SPAN_WINDOWS * lanes))
        self._bounds = [len(self._firsts) * span // count for span in range(count + 1)]
        ends = np.concatenate([[0], np.cumsum(self._window_rows)])
        self._starts: list[int] = ends[self._bounds].tolist()

    def blocks(self, position: int) -> Iterator[np.ndarray]:
        """The rows from `position` on, counted from the epoch's first, in pieces: `ROW` [any]."""
        for span in range(bisect.bisect_right(self._starts, position) - 1, len(self._starts) - 1):
            begin = max(0, position - self._starts[span])
            yield from self._span(span).blocks(begin, unit_rows=self._rows, lanes=self._lanes)

    def _span(self, span: int) -> Span:
        first, last = self._bounds[span : span + 2]
        return Span(
            number=self._number * len(self._firsts) + first,
            start=self._number * int(self._rows.sum()) + self._starts[span],
            window_rows=self._window_rows[first:last],
            window=lambda which: self._window(first + which),
        )

    def _window(self, number: int) -> Window:
        first = self._firsts[number]
        units = self._units[first : first + self._window_units]
        return Window(units=tuple(units.tolist()), key=noise_key("window", self._seed, self._number, number))


class RowOrder:
    """An endless order that has every row once an epoch.

    Args:
        rows: of each unit, in the order of their names.
        window_units: units whose rows are shuffled together, over all lanes; each lane has at least one.
        seed: of all shuffles.
        lanes: of which each reads units of its own; with one, the order is that of version 0.1.

    Raises:
        ValueError: if there are no rows.
    """

    def __init__(self, rows: Sequence[int], *, window_units: int, seed: int, lanes: int = 1) -> None:
        if sum(rows) < 1:
            raise ValueError("there are no rows to train on; the table is empty, or all of it is held out")
        self._rows = np.asarray(rows, dtype=np.int64)
        self._seed, self._lanes = seed, lanes
        self._window_units = math.ceil(window_units / lanes)

    @property
    def rows_per_epoch(self) -> int:
        """Rows of an epoch."""
        return int(self._rows.sum())

    @property
    def rows_in_flight(self) -> int:
        """Rows of a window of each lane, in the mean."""
        windows = math.ceil(len(self._rows) / self._window_units)
        return math.ceil(min(self._lanes, windows) * self.rows_per_epoch / windows)

    def knows(self, position: int) -> bool:
        """Whether the rows before `position` are known, so that nobody waits for them: always."""
        return True

    def batches(self, position: int, *, rows: int) -> Iterator[np.ndarray]:
        """The rows from `position` on, endless, as `ROW` [rows]; with lanes each batch is sorted by file."""
        return cut_batches(self.blocks(position), rows=rows, by_file=self._lanes > 1)

    def blocks(self, position: int) -> Iterator[np.ndarray]:
        """The rows from `position` on, endless, in pieces: `ROW` [any]."""
        first, position = divmod(position, self.rows_per_epoch)
        for number in itertools.count(first):
            epoch = Epoch(
                number, self._rows, window_units=self._window_units, lanes=self._lanes, seed=self._seed
            )
            yield from epoch.blocks(position)
            position = 0


def cut_batches(blocks: Iterator[np.ndarray], *, rows: int, by_file: bool) -> Iterator[np.ndarray]:
    """Batches of `rows` rows of pieces of an order, each sorted by file if `by_file`: `ROW` [rows]."""
    pending = np.empty(0, ROW)
    for block in blocks:
        pending = np.concatenate([pending, block])
        while len(pending) >= rows:
            batch, pending = pending[:rows], pending[rows:]
            yield _by_file(batch) if by_file else batch


def permutation(key: int, count: int) -> np.ndarray:
    """0 .. count-1 in an order that depends on `key` alone: int64 [count].

    Generators of NumPy may change between versions; the raw words of Philox and a stable sort do not.
    """
    return np.argsort(np.random.Philox(key=key).random_raw(count), kind="stable")


def rank_share(batch: np.ndarray, *, rank: int, world: int) -> np.ndarray:
    """The rows of a batch, as `RowOrder.batches` yields them, for `rank` of `world`.

    Sorted by lane and file and cut into equal runs: a rank reads the files of its run, not those of the whole
    batch. A single rank gets the batch as it is.
    """
    if world == 1:
        return batch
    return _by_file(batch)[len(batch) * rank // world : len(batch) * (rank + 1) // world]


def _by_file(batch: np.ndarray) -> np.ndarray:
    # Stable, so the order within a file stays.
    return batch[np.lexsort((batch["turn"], batch["window"], batch["lane"]))]
