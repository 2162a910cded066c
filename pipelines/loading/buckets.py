"""A table whose rows have shapes of their own as batches of one shape each: a cursor for each bucket.

All rows of a step have one shape. Which one is drawn for each step, with the probability that a row of the
table has it; how far each cursor has come then follows from the position, and a restart needs to know nothing
else. So every row is seen as often as any other in the mean, and what a bucket lacks of a whole batch at the
end of its epoch comes from its next: a bucket with fewer rows than a batch has rows more than once in one.
Knows no Ray.
"""

from __future__ import annotations

import bisect
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.loading.loader import (
    BatchLoader,
    UnitReader,
    count_trainable,
    held_out_rows,
    is_held_out,
    to_batch,
)
from pipelines.loading.prefetch import Prefetcher
from pipelines.loading.settings import LoaderSettings
from pipelines.stages.crop import Shape
from pipelines.storage.objects import IO_THREADS
from pipelines.tables.schemas import SIDE_COLUMNS, array_type
from pipelines.tables.table import Snapshot, UnitFile
from snapfusion.noise import noise_key, uniform
from snapfusion.training.batch import Batch

RowCount = int | Mapping[Shape, int]
"""Rows of a unit that training may see; by shape, where they have their own."""


def count_training_rows(table: Snapshot, *, held_out: float) -> Sequence[RowCount]:
    """The rows of each unit of LATENTS or TARGETS that training may see."""
    if is_bucketed(table.identity):
        return count_by_shape(table, held_out=held_out)
    return count_trainable(table, held_out=held_out)


def is_bucketed(identity: Mapping[str, Any]) -> bool:
    """Whether the rows of LATENTS of this identity, or of TARGETS made of them, have shapes of their own."""
    latents = identity.get("latents", identity)
    return latents["images"].get("buckets") is not None


def count_by_shape(table: UnitReader, *, held_out: float) -> list[Mapping[Shape, int]]:
    """The rows of each unit that training may see, by height and width. Reads ids and sides."""

    def count(unit: UnitFile) -> Mapping[Shape, int]:
        rows = table.read_unit(unit, ["id", *SIDE_COLUMNS])
        ids, heights, widths = (rows[name].to_pylist() for name in ("id", *SIDE_COLUMNS))
        return Counter(
            (height, width)
            for row_id, height, width in zip(ids, heights, widths, strict=True)
            if not held_out or not is_held_out(row_id, fraction=held_out)
        )

    with ThreadPoolExecutor(IO_THREADS) as readers:
        return list(readers.map(count, table.units))


def total_rows(count: RowCount) -> int:
    """Rows of all shapes."""
    return count if isinstance(count, int) else sum(count.values())


def make_loader(
    table: UnitReader,
    *,
    columns: Sequence[str],
    global_batch: int,
    seed: int,
    settings: LoaderSettings,
    counts: Sequence[RowCount],
) -> BatchLoader | BucketLoader:
    """The batches of a table: of one shape each, where `counts` tells of several (see `count_training_rows`).

    Raises:
        ValueError: if there is no row to train on.
    """
    whole = [count for count in counts if isinstance(count, int)]
    by_shape = [count for count in counts if not isinstance(count, int)]
    if by_shape:
        return BucketLoader(
            table,
            columns=columns,
            global_batch=global_batch,
            seed=seed,
            settings=settings,
            counts=by_shape,
        )
    return BatchLoader(
        table, columns=columns, global_batch=global_batch, seed=seed, settings=settings, counts=whole
    )


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """The rows of one shape, as a table. Its units are those of `table` that have some."""

    table: UnitReader
    shape: Shape
    units: list[UnitFile]

    def read_unit(self, unit: UnitFile, columns: Sequence[str] | None = None) -> pa.Table:
        """The unit's rows of this shape, their arrays' shape stated."""
        wanted = None if columns is None else list(dict.fromkeys([*columns, *SIDE_COLUMNS]))
        rows = self.table.read_unit(unit, wanted)
        mine = pc.and_(
            *(pc.equal(rows[name], side) for name, side in zip(SIDE_COLUMNS, self.shape, strict=True))
        )
        rows = with_shape(rows.filter(mine), shape=self.shape)
        return rows if columns is None else rows.select(columns)


def with_shape(rows: pa.Table, *, shape: Shape) -> pa.Table:
    """Rows that all have this shape, with fields that state it."""
    height, width = shape
    fields = [
        array_type(field).of_picture(height=height, width=width).field(field.name)
        if b"cell" in (field.metadata or {})
        else field
        for field in rows.schema
    ]
    return rows.cast(pa.schema(fields))


class BucketLoader:
    """The batches of one training, each of one shape; otherwise as `pipelines.loading.loader.BatchLoader`.

    A cursor reads a unit for the rows of its own shape, so that a unit is read once an epoch for each of the
    shapes that it has.

    Args:
        table: a pinned snapshot.
        columns: those a batch has as tensors (see `pipelines.loading.loader.to_batch`).
        global_batch: rows of a step, over all ranks.
        seed: of the order, and of the bucket of each step.
        settings: how rows are chosen; windows are of units that have rows of the bucket.
        counts: what `count_by_shape` gave.

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
        counts: Sequence[Mapping[Shape, int]],
    ) -> None:
        self._table, self._seed = table, seed
        self._columns, self._held_out = columns, settings.held_out
        rows: Counter[Shape] = Counter()
        for count in counts:
            rows.update(count)
        self._shapes = sorted(shape for shape, number in rows.items() if number)
        self._ends = list(itertools.accumulate(rows[shape] for shape in self._shapes))
        if not self._shapes:
            raise ValueError("there is no row to train on; the table is empty, or all of it is held out")
        self._loaders: dict[Shape, BatchLoader] = {}
        for shape in self._shapes:
            mine = [index for index, count in enumerate(counts) if count.get(shape)]
            self._loaders[shape] = BatchLoader(
                Bucket(table=table, shape=shape, units=[table.units[index] for index in mine]),
                columns=columns,
                global_batch=global_batch,
                seed=noise_key("bucket", seed, *shape),
                settings=settings,
                counts=[counts[index][shape] for index in mine],
            )

    @property
    def rows_per_epoch(self) -> int:
        """Rows that training sees once an epoch of theirs."""
        return self._ends[-1]

    def bucket_at(self, step: int) -> Shape:
        """The height and width of all pictures of a step."""
        drawn = float(uniform(noise_key("bucket", self._seed, step), 1)[0])
        return self._shapes[bisect.bisect_right(self._ends, int(drawn * self._ends[-1]))]

    def batches(self, start: int, *, rank: int = 0, world: int = 1, depth: int = 2) -> Prefetcher[Batch]:
        """This rank's share of global batch `start`, `start` + 1, ... without end. To be closed."""
        return Prefetcher(self._sequence(start, rank=rank, world=world), depth=depth)

    def held_out(self, *, rows: int, limit: int | None = None) -> Iterator[Batch]:
        """The held-out rows in batches of at most `rows` and of one shape, at most `limit` of them.

        Unit by unit in the table's own order; smaller shapes of a unit come first.
        """
        names = ["id", *self._columns, *SIDE_COLUMNS]
        for unit in held_out_rows(self._table, names, fraction=self._held_out, limit=limit):
            sides = list(zip(*(unit[name].to_pylist() for name in SIDE_COLUMNS), strict=True))
            for shape in sorted(set(sides)):
                mine = unit.filter(pa.array([side == shape for side in sides]))
                stated = with_shape(mine, shape=shape).select(["id", *self._columns])
                yield from to_batch(stated).split(rows)

    def _sequence(self, start: int, *, rank: int, world: int) -> Iterator[Batch]:
        came = Counter(self.bucket_at(step) for step in range(start))
        cursors: dict[Shape, Iterator[Batch]] = {}
        for step in itertools.count(start):
            shape = self.bucket_at(step)
            if shape not in cursors:
                cursors[shape] = self._loaders[shape].stream(came[shape], rank=rank, world=world)
            yield next(cursors[shape])
