"""The order in which training reads rows: a function of the seed and the position, and of nothing else.

    epoch ─ its units, shuffled ─ windows of a few units ─ the rows of a window, shuffled ─ global batches

Epochs follow each other without a seam: a batch may end one and begin the next. A restart at any position
reads nothing of what came before it. The rows of a batch are dealt to the ranks by file, so that each file is
read by few of them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from snapfusion.noise import noise_key


@dataclass(frozen=True, kw_only=True)
class Window:
    """A range of positions whose rows are shuffled among themselves.

    Attributes:
        units: indices of the units whose rows it has, in the order in which they are read.
        start: position of its first row.
        key: of the shuffle.
        rows: number of its rows.
    """

    units: tuple[int, ...]
    start: int
    key: int
    rows: int

    @property
    def stop(self) -> int:
        """The position after its last row."""
        return self.start + self.rows

    def row_indices(self, sizes: np.ndarray) -> np.ndarray:
        """Turn, unit and row of each position: int64 [rows, 3], for units of `sizes` rows.

        The turn is the unit's index in `units`; the row counts only those that are trained on.
        """
        units = np.asarray(self.units, dtype=np.int64)
        ends = np.cumsum(sizes[units])
        shuffled = permutation(self.key, self.rows)
        turn = np.searchsorted(ends, shuffled, side="right")
        return np.stack([turn, units[turn], shuffled - (ends - sizes[units])[turn]], axis=1)


class RowOrder:
    """An endless order that has every row once an epoch.

    Args:
        rows: of each unit, in the order of their names.
        window_units: units whose rows are shuffled together; those of two windows are in memory at a time.
        seed: of all shuffles.

    Raises:
        ValueError: if there are no rows.
    """

    def __init__(self, rows: Sequence[int], *, window_units: int, seed: int) -> None:
        if sum(rows) < 1:
            raise ValueError("there are no rows to train on; the table is empty, or all of it is held out")
        self._rows = np.asarray(rows, dtype=np.int64)
        self._window_units, self._seed = window_units, seed

    @property
    def rows_per_epoch(self) -> int:
        """Rows of an epoch."""
        return int(self._rows.sum())

    def windows(self, position: int) -> Iterator[Window]:
        """The endless windows from the one that has `position` on."""
        epoch = position // self.rows_per_epoch
        while True:
            for window in self._epoch(epoch):
                if window.stop > position:
                    yield window
            epoch += 1

    def batches(self, position: int, *, rows: int) -> Iterator[np.ndarray]:
        """The rows from `position` on, `rows` at a time, endless: int64 [rows, 4].

        Columns: the window, counted from the first; turn, unit and row as in `Window.row_indices`.
        """
        pending = np.empty((0, 4), np.int64)
        for number, window in enumerate(self.windows(position)):
            # A restart in the middle of a window skips its first rows; they still shape the shuffle.
            indices = window.row_indices(self._rows)[max(0, position - window.start) :]
            pending = np.concatenate([pending, np.insert(indices, 0, number, axis=1)])
            while len(pending) >= rows:
                yield pending[:rows]
                pending = pending[rows:]

    def _epoch(self, epoch: int) -> Iterator[Window]:
        # Units are shuffled as well as rows: neighbours in a source tend to be alike.
        units = permutation(noise_key("units", self._seed, epoch), len(self._rows))
        start = epoch * self.rows_per_epoch
        for number, first in enumerate(range(0, len(units), self._window_units)):
            chosen = units[first : first + self._window_units]
            rows = int(self._rows[chosen].sum())
            key = noise_key("window", self._seed, epoch, number)
            yield Window(units=tuple(chosen.tolist()), start=start, key=key, rows=rows)
            start += rows


def permutation(key: int, count: int) -> np.ndarray:
    """0 .. count-1 in an order that depends on `key` alone: int64 [count].

    Generators of NumPy may change between versions; the raw words of Philox and a stable sort do not.
    """
    return np.argsort(np.random.Philox(key=key).random_raw(count), kind="stable")


def rank_share(batch: np.ndarray, *, rank: int, world: int) -> np.ndarray:
    """The rows of a batch, as `RowOrder.batches` yields them, for `rank` of `world`.

    Sorted by file and cut into equal runs: a rank reads the files of its run, not those of the whole batch.
    The sort is stable, so the order within a file stays. A single rank gets the batch as it is.
    """
    if world == 1:
        return batch
    by_file = batch[np.lexsort((batch[:, 1], batch[:, 0]))]
    return by_file[len(batch) * rank // world : len(batch) * (rank + 1) // world]
