"""Loads a table that is still being written: epoch 0 in the order in which its units are planned.

    epoch 0 ─ the units in their planned order ─ windows of neighbours, a span of one for each lane
    later   ─ as of a table whose units are all there (`pipelines.loading.order`)

The rows of a span are known once its units are: so each position has the same row whether the table grows
meanwhile, was there before, or is read again after a restart.
"""

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np

from pipelines.loading.followed import FollowedUnits
from pipelines.loading.loader import BatchLoader, UnitReader, UnitSubset
from pipelines.loading.order import RowOrder, Span, Window, cut_batches
from pipelines.loading.settings import LoaderSettings
from snapfusion.noise import noise_key
from snapfusion.training.batch import Batch


def units_of_window(settings: LoaderSettings) -> int:
    """Units of a window of one lane."""
    return math.ceil(settings.window_units / settings.lanes)


def units_of_span(settings: LoaderSettings) -> int:
    """Units of a span of epoch 0, one window of each lane: its rows are read once all are there."""
    return units_of_window(settings) * settings.lanes


class FollowedOrder:
    """An endless order that has every row once an epoch, of units that become known one after the other.

    Args:
        units: in their planned order.
        seed: of all shuffles.
        settings: the windows and lanes.
    """

    def __init__(self, units: FollowedUnits, *, seed: int, settings: LoaderSettings) -> None:
        self._units, self._seed, self._settings = units, seed, settings
        self._span_units = units_of_span(settings)

    @property
    def rows_in_flight(self) -> int:
        """Rows of a window of each lane, in the mean of those that are known. Waits for the first."""
        self._units.wait_for(self._span_units)
        spans = math.ceil(len(self._units) / self._span_units)
        return math.ceil(self._units.ends[-1] / spans)

    def knows(self, position: int) -> bool:
        """Whether the rows before `position` are known, so that nobody waits for them."""
        spans = len(self._units) // self._span_units
        while not self._units.complete and (
            spans == 0 or self._units.ends[spans * self._span_units - 1] < position
        ):
            if not self._units.knows((spans + 1) * self._span_units):
                return False
            spans = len(self._units) // self._span_units
        return True

    def batches(self, position: int, *, rows: int) -> Iterator[np.ndarray]:
        """The rows from `position` on, endless, as `ROW` [rows]; waits for units that are not known yet.

        Raises:
            ValueError: if all units are known, and there are no rows.
        """
        return cut_batches(self._blocks(position), rows=rows, by_file=self._settings.lanes > 1)

    def _blocks(self, position: int) -> Iterator[np.ndarray]:
        start = 0
        for first in itertools.count(0, self._span_units):
            self._units.wait_for(first + self._span_units)
            counts = np.array(self._units.counts[first : first + self._span_units], np.int64)
            if not len(counts):
                break
            begin, rows = max(0, position - start), int(counts.sum())
            if begin < rows:
                yield from self._span(first, counts, start=start, begin=begin)
            start += rows
        yield from self._later_epochs(max(position, start))

    def _span(self, first: int, counts: np.ndarray, *, start: int, begin: int) -> Iterator[np.ndarray]:
        """The rows of the span whose first unit is `first`, from its row `begin` on."""
        window_units = units_of_window(self._settings)
        firsts = np.arange(0, len(counts), window_units)
        number = first // window_units

        def window(which: int) -> Window:
            units = range(len(counts))[firsts[which] : firsts[which] + window_units]
            return Window(units=tuple(units), key=noise_key("window", self._seed, 0, number + which))

        span = Span(number=number, start=start, window_rows=np.add.reduceat(counts, firsts), window=window)
        for block in span.blocks(begin, unit_rows=counts, lanes=self._settings.lanes):
            block["unit"] += first
            yield block

    def _later_epochs(self, position: int) -> Iterator[np.ndarray]:
        # In the order of their names, as the units of any table.
        by_name = np.array(sorted(range(len(self._units)), key=lambda index: self._units[index].unit))
        order = RowOrder(
            [self._units.counts[index] for index in by_name],
            window_units=self._settings.window_units,
            seed=self._seed,
            lanes=self._settings.lanes,
        )
        for block in order.blocks(position):
            block["unit"] = by_name[block["unit"]]
            yield block


class FollowingLoader(BatchLoader):
    """The batches of a training on a growing table; otherwise as `BatchLoader`.

    Args:
        table: reads the units.
        units: in their planned order.
        columns: those a batch has as tensors.
        global_batch: rows of a step, over all ranks.
        seed: of the order.
        settings: the choice and order of rows.
    """

    def __init__(
        self,
        table: UnitReader,
        *,
        units: FollowedUnits,
        columns: Sequence[str],
        global_batch: int,
        seed: int,
        settings: LoaderSettings,
    ) -> None:
        super().__init__(
            UnitSubset(table=table, units=units),
            columns=columns,
            global_batch=global_batch,
            seed=seed,
            settings=settings,
            counts=units.counts,
            order=FollowedOrder(units, seed=seed, settings=settings),
        )
        self._units = units

    def held_out(self, *, rows: int, limit: int | None = None) -> Iterator[Batch]:
        """The first held-out rows in the planned order; waits while there are fewer than `limit`."""
        # The batches are closed by now, which has ended the waits.
        self._units.resume()
        yield from super().held_out(rows=rows, limit=limit)

    def interrupt(self) -> None:
        """End a wait for units."""
        self._units.interrupt()
