"""A table snapshot as the sequence of global batches that training sees, and its held-out rows.

The sequence depends on the seed and the position only: not on the number of workers, not on a restart. Each
rank reads the files that its share of a batch lies in, and decodes its own rows. Knows no Ray.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipelines.loading.order import RowOrder, rank_share
from pipelines.loading.prefetch import Prefetcher
from pipelines.loading.settings import LoaderSettings
from pipelines.storage.objects import IO_THREADS
from pipelines.tables.schemas import array_type, from_png
from pipelines.tables.table import UnitFile
from snapfusion.noise import noise_key
from snapfusion.training.batch import Batch


class LoaderError(ValueError):
    """A row that cannot be decoded, or a table that is not what it was when its rows were counted."""


class UnitReader(Protocol):
    """What is needed of a snapshot (`pipelines.tables.table.Snapshot`)."""

    @property
    def units(self) -> list[UnitFile]:
        """The files, ordered by unit."""
        ...

    def read_unit(self, unit: UnitFile, columns: Sequence[str] | None = None) -> pa.Table:
        """The rows of one unit."""
        ...


def is_held_out(row_id: str, *, fraction: float) -> bool:
    """Whether a row is kept for evaluation: its id hashes into the last `fraction`. No seed changes this."""
    return noise_key("held out", row_id) >= (1.0 - fraction) * 2.0**63


def count_trainable(table: UnitReader, *, held_out: float) -> list[int]:
    """The rows of each unit that training may see. Reads the ids, unless nothing is held out."""
    if held_out == 0.0:
        return [unit.rows for unit in table.units]
    with ThreadPoolExecutor(IO_THREADS) as readers:
        ids = readers.map(lambda unit: table.read_unit(unit, ["id"])["id"].to_pylist(), table.units)
        return [sum(not is_held_out(row, fraction=held_out) for row in unit) for unit in ids]


def held_out_rows(
    table: UnitReader, columns: Sequence[str], *, fraction: float, limit: int | None = None
) -> Iterator[pa.Table]:
    """The held-out rows of each unit that has some, in the table's own order, at most `limit` of them."""
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


class BatchLoader:
    """The batches of one training.

    Args:
        table: a pinned snapshot.
        columns: those a batch has as tensors (see `to_batch`).
        global_batch: rows of a step, over all ranks.
        seed: of the order.
        settings: how rows are chosen.
        counts: what `count_trainable` gave, where somebody has counted already.

    Raises:
        ValueError: if there is no row to train on.
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

    @property
    def rows_per_epoch(self) -> int:
        """Rows that training sees once an epoch."""
        return self._order.rows_per_epoch

    def batches(self, start: int, *, rank: int = 0, world: int = 1, depth: int = 2) -> Prefetcher[Batch]:
        """This rank's share of global batch `start`, `start` + 1, ... without end.

        Reading and decoding go on in the background, `depth` batches and one window ahead. To be closed.
        """
        return Prefetcher(self.stream(start, rank=rank, world=world), depth=depth)

    def held_out(self, *, rows: int, limit: int | None = None) -> Iterator[Batch]:
        """The held-out rows in the table's own order, in batches of `rows`, at most `limit` of them."""
        found = held_out_rows(self._table, self._columns, fraction=self._held_out, limit=limit)
        for unit in found:
            yield from to_batch(unit).split(rows)

    def _is_held_out(self, row_id: str) -> bool:
        return is_held_out(row_id, fraction=self._held_out)

    def stream(self, start: int, *, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """As `batches`, but each is decoded when it is asked for."""
        batches = self._order.batches(start * self._global_batch, rows=self._global_batch)
        shares = (rank_share(batch, rank=rank, world=world) for batch in batches)
        with ThreadPoolExecutor(1) as reader:
            for files in _read_ahead(shares, read=lambda unit: reader.submit(self._read, unit)):
                yield to_batch(files.rows())

    def _read(self, index: int) -> pa.Table:
        """The rows of a unit that may be trained on."""
        unit = self._table.units[index]
        rows = self._table.read_unit(unit, self._columns)
        if self._held_out:
            mask = [not self._is_held_out(row_id) for row_id in rows["id"].to_pylist()]
            rows = rows.filter(pa.array(mask, pa.bool_()))
        if rows.num_rows != self._counts[index]:
            raise LoaderError(
                f"{unit.path} has {rows.num_rows} rows to train on, {self._counts[index]} were counted: "
                "the file was changed"
            )
        return rows


WindowFile = tuple[int, int]
"""A window and the turn of one of its units: a unit comes again in each epoch."""


@dataclass(frozen=True, kw_only=True)
class _Share:
    """A share of a batch, and the files that it lies in, which are being read."""

    places: np.ndarray
    files: Mapping[WindowFile, Future[pa.Table]]

    def rows(self) -> pa.Table:
        """The rows in their order, once their files have been read."""
        found, first, starts = [], 0, {}
        for file in _files_in(self.places):
            found.append(self.files[file].result())
            starts[file] = first
            first += found[-1].num_rows
        at = [starts[window, turn] + row for window, turn, _, row in self.places.tolist()]
        return pa.concat_tables(found).take(pa.array(at, pa.int64()))


def _read_ahead(shares: Iterator[np.ndarray], *, read: Callable[[int], Future[pa.Table]]) -> Iterator[_Share]:
    """Each share with its files, those of the next window being read meanwhile.

    In memory are files of the windows that the share lies in, and of the one after them.
    """
    coming, wanted = deque([next(shares)]), deque[tuple[WindowFile, int]]()
    wanted.extend(_files_in(coming[0]).items())
    files: dict[WindowFile, Future[pa.Table]] = {}
    while True:
        share = coming.popleft()
        horizon = int(share[:, 0].max()) + 1
        while not coming or int(coming[-1][:, 0].max()) <= horizon:
            coming.append(next(shares))
            wanted.extend(_files_in(coming[-1]).items())
        while wanted and wanted[0][0][0] <= horizon:
            file, unit = wanted.popleft()
            if file not in files:
                files[file] = read(unit)
        yield _Share(places=share, files=files)
        needed = int(coming[0][:, 0].min())
        files = {file: rows for file, rows in files.items() if file[0] >= needed}


def _files_in(places: np.ndarray) -> dict[WindowFile, int]:
    """The files of a share with their units, in the order in which windows read them."""
    found = np.unique(places[:, :3], axis=0)
    return {(window, turn): unit for window, turn, unit in found.tolist()}


def to_batch(rows: pa.Table) -> Batch:
    """Rows as tensors.

    arrays (binary, its field stating shape and dtype)   float32 [B, *shape] of floats, int64 of integers
    PNG images (binary, its field stating format png)    uint8 [B,3,H,W]
    numbers                                              [B] in their own dtype

    Raises:
        LoaderError: if a column is missing from a row, has another form, or cannot be decoded.
    """
    ids = tuple(rows["id"].to_pylist())
    columns = {
        field.name: _decode(rows[field.name], field, ids=ids) for field in rows.schema if field.name != "id"
    }
    return Batch(ids=ids, columns=columns)


def _decode(column: pa.ChunkedArray, field: pa.Field, *, ids: Sequence[str]) -> Tensor:
    if column.null_count:
        missing = ids[column.is_null().index(True).as_py()]
        raise LoaderError(
            f"row {missing} has no {field.name}: the table was made without, and the recipe asks for it"
        )
    try:
        if (field.metadata or {}).get(b"format") == b"png":
            images = [torch.from_numpy(from_png(data).copy()) for data in column.to_pylist()]
            return torch.stack(images).permute(0, 3, 1, 2).contiguous()
        if pa.types.is_binary(field.type):
            values = array_type(field).unpack(column.to_pylist())
            return torch.from_numpy(values.astype(np.float32 if values.dtype.kind == "f" else np.int64))
        return torch.from_numpy(column.to_numpy().copy())
    except (ValueError, OSError, TypeError, RuntimeError) as error:
        raise LoaderError(f"column {field.name} of rows {ids[0]} .. {ids[-1]}: {error}") from error
