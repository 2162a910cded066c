"""Loads a table snapshot as the global batches of a training, and its held-out rows.

The sequence of batches depends on the seed and the position alone, not on the number of ranks or a restart.
Each rank reads the files of its share of a batch and decodes its own rows.
"""

import itertools
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, Protocol, TypedDict, TypeVar

import numpy as np
import pyarrow as pa

from pipelines.loading.order import RowOrder, rank_share
from pipelines.loading.prefetch import Prefetcher
from pipelines.loading.read_ahead import Share, read_ahead
from pipelines.loading.rows import LoaderError, UnitRows, gather, to_batch
from pipelines.loading.settings import LoaderSettings
from pipelines.storage.objects import IO_THREADS, is_local
from pipelines.tables.row_keys import held_out_key, least_key
from pipelines.tables.unit_files import UnitFile
from snapfusion.training.batch import Batch


class UnitReader(Protocol):
    """The part of `pipelines.tables.table.Snapshot` that loaders use."""

    @property
    def units(self) -> Sequence[UnitFile]:
        """The files, ordered by unit."""

    def read_unit(self, unit: UnitFile, columns: Sequence[str] | None = None) -> pa.Table:
        """The rows of one unit."""


@dataclass(frozen=True, kw_only=True)
class UnitSubset:
    """Some units of a table, as a table."""

    table: UnitReader
    units: Sequence[UnitFile]

    def read_unit(self, unit: UnitFile, columns: Sequence[str] | None = None) -> pa.Table:
        """The rows of one unit."""
        return self.table.read_unit(unit, columns)


def is_held_out(row_id: str, *, fraction: float) -> bool:
    """Whether a row is kept for evaluation: its id hashes into the last `fraction`, whatever the seed."""
    return held_out_key(row_id) >= least_key(fraction)


def count_trainable(table: UnitReader, *, held_out: float) -> list[int]:
    """The rows of each unit to train on. Reads the ids, unless nothing is held out."""
    if held_out == 0.0:
        return [unit.rows for unit in table.units]
    with ThreadPoolExecutor(IO_THREADS) as readers:
        ids = readers.map(lambda unit: table.read_unit(unit, ["id"])["id"].to_pylist(), table.units)
        return [sum(not is_held_out(row, fraction=held_out) for row in unit) for unit in ids]


def held_out_rows(
    table: UnitReader, columns: Sequence[str], *, fraction: float, limit: int | None = None
) -> Iterator[pa.Table]:
    """The held-out rows, one table for each unit that has some, in their order, at most `limit` rows."""
    left = limit
    for unit in table.units:
        ids = table.read_unit(unit, ["id"])["id"].to_pylist()
        chosen = [row for row, row_id in enumerate(ids) if is_held_out(row_id, fraction=fraction)][:left]
        if chosen:
            yield table.read_unit(unit, columns).take(pa.array(chosen))
        if left is not None:
            left -= len(chosen)
            if left <= 0:
                return


class Order(Protocol):
    """The order in which a training reads rows: `RowOrder`, or that of a growing table."""

    @property
    def rows_in_flight(self) -> int:
        """Rows of a window of each lane, in the mean."""

    def knows(self, position: int) -> bool:
        """Whether the rows before `position` are known, so that nobody waits for them."""

    def batches(self, position: int, *, rows: int) -> Iterator[np.ndarray]:
        """The rows from `position` on, endless, as `pipelines.loading.order.ROW` [rows]."""


class LoaderOptions(TypedDict):
    """Keyword arguments of the loaders of a table and of a bucket; see `BatchLoader`."""

    columns: Sequence[str]
    global_batch: int
    settings: LoaderSettings


class PrepareBatch(Protocol):
    """Adds to a batch what its step needs beside the rows, such as their random draws."""

    def __call__(self, batch: Batch, *, step: int) -> Batch:
        """The batch of a step, prepared."""


class PrefetchingLoader(ABC):
    """Base of the loaders: their batches are decoded in a thread."""

    @abstractmethod
    def stream(self, start: int, *, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """This rank's share of global batches `start`, `start` + 1, ... without end, decoded on demand."""

    def batches(
        self,
        start: int,
        *,
        rank: int = 0,
        world: int = 1,
        depth: int = 2,
        prepare: PrepareBatch | None = None,
    ) -> Prefetcher[Batch]:
        """As `stream`, but a thread makes up to `depth` batches ahead, prepared; the caller closes it."""
        batches = self.stream(start, rank=rank, world=world)
        if prepare is not None:
            batches = (prepare(batch, step=step) for step, batch in enumerate(batches, start))
        return Prefetcher(batches, depth=depth, interrupt=self.interrupt)

    def interrupt(self) -> None:  # noqa: B027 - most loaders wait for nothing
        """End a wait for rows: whoever takes batches has closed them."""


class BatchLoader(PrefetchingLoader):
    """The batches of one training.

    Args:
        table: a pinned snapshot.
        columns: those a batch has as tensors (see `to_batch`).
        global_batch: rows of a step, over all ranks.
        seed: of the order.
        settings: the choice and order of rows.
        counts: the result of `count_trainable`, if there is one already.
        order: of the rows; by default that of the table, of which all units are there.

    Raises:
        ValueError: if there are no rows to train on.
    """

    def __init__(
        self,
        table: UnitReader,
        *,
        columns: Sequence[str],
        global_batch: int,
        seed: int,
        settings: LoaderSettings,
        counts: Sequence[int] | None = None,
        order: Order | None = None,
    ) -> None:
        self._table, self._global_batch = table, global_batch
        self._columns = ["id", *columns]
        self._held_out = settings.held_out
        # Not copied: those of a growing table grow.
        self._counts = count_trainable(table, held_out=settings.held_out) if counts is None else counts
        self._order = order or RowOrder(
            self._counts, window_units=settings.window_units, seed=seed, lanes=settings.lanes
        )
        # From a disk one reader keeps ahead. A store answers late, and at the start all lanes wait for it.
        self._readers = 1 if is_local(table.units[0].path) else IO_THREADS

    def held_out(self, *, rows: int, limit: int | None = None) -> Iterator[Batch]:
        """The held-out rows in the table's order, in batches of `rows`, at most `limit` of them."""
        for unit in held_out_rows(self._table, self._columns, fraction=self._held_out, limit=limit):
            yield from to_batch(unit).split(rows)

    def stream(self, start: int, *, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """As in `PrefetchingLoader`."""
        with ThreadPoolExecutor(self._readers) as readers:
            files = read_ahead(
                self._shares(start, rank=rank, world=world),
                read=lambda unit: readers.submit(self._read, unit),
                ahead=self._order.rows_in_flight,
                ready=lambda end: self._order.knows(end + self._global_batch),
            )
            for share, units in files:
                window, turn, row = (share.rows[name].tolist() for name in ("window", "turn", "row"))
                of_rows = list(zip(window, turn, strict=True))
                ready = {file: units[file].result() for file in dict.fromkeys(of_rows)}
                yield gather([ready[file] for file in of_rows], row)

    def _shares(self, start: int, *, rank: int, world: int) -> Iterator[Share]:
        """The rows of `rank` in global batches `start`, `start` + 1, ..."""
        rows = self._global_batch
        for number, batch in enumerate(self._order.batches(start * rows, rows=rows), start=start + 1):
            yield Share(rows=rank_share(batch, rank=rank, world=world), end=number * rows)

    def _read(self, index: int) -> UnitRows:
        """The rows of a unit to train on."""
        unit = self._table.units[index]
        table, kept = self._table.read_unit(unit, self._columns), None
        if self._held_out:
            ids = table["id"].to_pylist()
            kept = [row for row, row_id in enumerate(ids) if not is_held_out(row_id, fraction=self._held_out)]
        rows = UnitRows(table, kept=kept)
        # The order was made from the counts: other numbers of rows would shift every batch unnoticed.
        if rows.num_rows != self._counts[index]:
            raise LoaderError(
                f"{unit.path} has {rows.num_rows} rows to train on, {self._counts[index]} were counted: "
                "the file was changed"
            )
        return rows


Key = TypeVar("Key")


class InterleavedLoader(PrefetchingLoader, Generic[Key]):
    """Base of loaders that take each step's batch from one of several loaders, with a cursor for each.

    Attributes:
        loaders: by key.
    """

    loaders: Mapping[Key, PrefetchingLoader]

    @abstractmethod
    def key_at(self, step: int) -> Key:
        """The loader of a step; it follows from the step alone, so any step can be computed on its own."""

    def stream(self, start: int, *, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """As in `PrefetchingLoader`.

        Raises:
            LoaderError: if the table has no row for a step.
        """
        # Counted from the first step: the keys need not be regular.
        before = Counter(self.key_at(step) for step in range(start))
        # Created on first use: each cursor reads in a thread and holds two windows of files in memory.
        cursors: dict[Key, Iterator[Batch]] = {}
        for step in itertools.count(start):
            key = self.key_at(step)
            if key not in self.loaders:
                raise LoaderError(f"step {step} needs {key} rows, and the table has none to train on")
            if key not in cursors:
                cursors[key] = self.loaders[key].stream(before[key], rank=rank, world=world)
            yield next(cursors[key])
