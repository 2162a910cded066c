"""Loads a table snapshot as the global batches of a training, and its held-out rows.

The sequence of batches depends on the seed and the position alone, not on the number of ranks or a restart.
Each rank reads the files of its share of a batch and decodes its own rows.
"""

import itertools
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, Protocol, TypedDict, TypeVar

import numpy as np
import pyarrow as pa

from pipelines.loading.order import RowOrder, rank_share
from pipelines.loading.prefetch import Prefetcher
from pipelines.loading.rows import LoaderError, UnitRows, gather, to_batch
from pipelines.loading.settings import LoaderSettings
from pipelines.storage.objects import IO_THREADS
from pipelines.tables.table import UnitFile
from snapfusion.noise import noise_key
from snapfusion.training.batch import Batch


class UnitReader(Protocol):
    """The part of `pipelines.tables.table.Snapshot` that loaders use."""

    @property
    def units(self) -> list[UnitFile]:
        """The files, ordered by unit."""

    def read_unit(self, unit: UnitFile, columns: Sequence[str] | None = None) -> pa.Table:
        """The rows of one unit."""


@dataclass(frozen=True, kw_only=True)
class UnitSubset:
    """Some units of a table, as a table."""

    table: UnitReader
    units: list[UnitFile]

    def read_unit(self, unit: UnitFile, columns: Sequence[str] | None = None) -> pa.Table:
        """The rows of one unit."""
        return self.table.read_unit(unit, columns)


def is_held_out(row_id: str, *, fraction: float) -> bool:
    """Whether a row is kept for evaluation: its id hashes into the last `fraction`, whatever the seed."""
    # The last part of the range, so a larger fraction keeps all rows of a smaller one.
    return noise_key("held out", row_id) >= (1.0 - fraction) * 2.0**63


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


class LoaderOptions(TypedDict):
    """Keyword arguments of the loaders of a table and of a bucket; see `BatchLoader`."""

    columns: Sequence[str]
    global_batch: int
    settings: LoaderSettings


class PrefetchingLoader(ABC):
    """Base of the loaders: their batches are decoded in a thread."""

    @abstractmethod
    def stream(self, start: int, *, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """This rank's share of global batches `start`, `start` + 1, ... without end, decoded on demand."""

    def batches(self, start: int, *, rank: int = 0, world: int = 1, depth: int = 2) -> Prefetcher[Batch]:
        """As `stream`, but a thread decodes up to `depth` batches ahead; the caller closes it."""
        return Prefetcher(self.stream(start, rank=rank, world=world), depth=depth)


class BatchLoader(PrefetchingLoader):
    """The batches of one training.

    Args:
        table: a pinned snapshot.
        columns: those a batch has as tensors (see `to_batch`).
        global_batch: rows of a step, over all ranks.
        seed: of the order.
        settings: the choice and order of rows.
        counts: the result of `count_trainable`, if there is one already.

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
    ) -> None:
        self._table, self._global_batch = table, global_batch
        self._columns = ["id", *columns]
        self._held_out = settings.held_out
        self._counts = list(counts or count_trainable(table, held_out=settings.held_out))
        self._order = RowOrder(self._counts, window_units=settings.window_units, seed=seed)

    def held_out(self, *, rows: int, limit: int | None = None) -> Iterator[Batch]:
        """The held-out rows in the table's order, in batches of `rows`, at most `limit` of them."""
        for unit in held_out_rows(self._table, self._columns, fraction=self._held_out, limit=limit):
            yield from to_batch(unit).split(rows)

    def stream(self, start: int, *, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """As in `PrefetchingLoader`."""
        batches = self._order.batches(start * self._global_batch, rows=self._global_batch)
        shares = (rank_share(batch, rank=rank, world=world) for batch in batches)
        # One reader is enough: it stays a window ahead, and each read fetches a whole file.
        with ThreadPoolExecutor(1) as reader:
            for indices, files in _read_ahead(shares, read=lambda unit: reader.submit(self._read, unit)):
                of_rows = [(window, turn) for window, turn, _, _ in indices.tolist()]
                ready = {file: files[file].result() for file in dict.fromkeys(of_rows)}
                yield gather([ready[file] for file in of_rows], indices[:, 3].tolist())

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


WindowFile = tuple[int, int]
"""A window and the turn of one of its units: each epoch reads a unit anew."""


def _read_ahead(
    shares: Iterator[np.ndarray], *, read: Callable[[int], Future[UnitRows]]
) -> Iterator[tuple[np.ndarray, dict[WindowFile, Future[UnitRows]]]]:
    """Each share with its files, while those of the window after it are being read.

    A share is a rank's part of a batch: int64 [rows, 4] as in `RowOrder.batches`. In memory are the files of
    the windows that it lies in, and of the one after them.
    """
    upcoming, unread = deque([next(shares)]), deque[tuple[WindowFile, int]]()
    unread.extend(_files_in(upcoming[0]).items())
    files: dict[WindowFile, Future[UnitRows]] = {}
    while True:
        share = upcoming.popleft()
        # A share names only its own rows, so the files of the next window become known by looking ahead
        # at shares until one lies beyond it. Shares are numbers and cost next to nothing; files cost memory.
        horizon = int(share[:, 0].max()) + 1
        while not upcoming or int(upcoming[-1][:, 0].max()) <= horizon:
            upcoming.append(next(shares))
            unread.extend(_files_in(upcoming[-1]).items())
        # Consecutive shares lie in the same files: each is submitted once, in the order of first use.
        while unread and unread[0][0][0] <= horizon:
            file, unit = unread.popleft()
            if file not in files:
                files[file] = read(unit)
        yield share, files
        # Windows only advance, so files before the next share's first window are never needed again.
        needed = int(upcoming[0][:, 0].min())
        files = {file: rows for file, rows in files.items() if file[0] >= needed}


def _files_in(indices: np.ndarray) -> dict[WindowFile, int]:
    """The files of a share with their units, in the order of first use."""
    return {(window, turn): unit for window, turn, unit, _ in indices.tolist()}
