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

from pipelines.loader import (
    BatchLoader,
    LoaderSettings,
    Table,
    count_trainable,
    held_out_rows,
    is_held_out,
    to_batch,
)
from pipelines.prefetch import Prefetched
from pipelines.schemas import SIDES, array_of
from pipelines.stages.frame import Shape
from pipelines.storage import READERS
from pipelines.tables import Snapshot, UnitFile
from snapfusion.noise import noise_key, uniform
from snapfusion.training.batch import Batch

Count = int | Mapping[Shape, int]
"""Rows of a unit that training may see; by shape, where they have their own."""


def count_rows(table: Snapshot, *, held_out: float) -> Sequence[Count]:
    """The rows of each unit of LATENTS or TARGETS that training may see."""
    if is_bucketed(table.identity):
        return count_by_shape(table, held_out=held_out)
    return count_trainable(table, held_out=held_out)


def is_bucketed(identity: Mapping[str, Any]) -> bool:
    """Whether the rows of LATENTS of this identity, or of TARGETS made of them, have shapes of their own."""
    latents = identity.get("latents", identity)
    return latents["images"].get("buckets") is not None


def count_by_shape(table: Table, *, held_out: float) -> list[Mapping[Shape, int]]:
    """The rows of each unit that training may see, by height and width. Reads ids and sides."""

    def count(unit: UnitFile) -> Mapping[Shape, int]:
        rows = table.read_unit(unit, ["id", *SIDES])
        ids, heights, widths = (rows[name].to_pylist() for name in ("id", *SIDES))
        return Counter(
            (height, width)
            for row_id, height, width in zip(ids, heights, widths, strict=True)
            if not held_out or not is_held_out(row_id, fraction=held_out)
        )

    with ThreadPoolExecutor(READERS) as readers:
        return list(readers.map(count, table.units))


def rows_in(count: Count) -> int:
    """Rows of all shapes."""
    return count if isinstance(count, int) else sum(count.values())


def loader_of(
    table: Table,
    *,
    columns: Sequence[str],
    global_batch: int,
    seed: int,
    settings: LoaderSettings,
    counts: Sequence[Count],
) -> BatchLoader | BucketLoader:
    """The batches of a table: of one shape each, where `counts` tells of several (see `count_rows`).

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

    table: Table
    shape: Shape
    units: list[UnitFile]

    def read_unit(self, unit: UnitFile, columns: Sequence[str] | None = None) -> pa.Table:
        """The unit's rows of this shape, their arrays' shape stated."""
        wanted = None if columns is None else list(dict.fromkeys([*columns, *SIDES]))
        rows = self.table.read_unit(unit, wanted)
        mine = pc.and_(*(pc.equal(rows[name], side) for name, side in zip(SIDES, self.shape, strict=True)))
        rows = of_one_shape(rows.filter(mine), shape=self.shape)
        return rows if columns is None else rows.select(columns)


def of_one_shape(rows: pa.Table, *, shape: Shape) -> pa.Table:
    """Rows that all have this shape, with fields that state it."""
    height, width = shape
    fields = [
        array_of(field).of_picture(height=height, width=width).field(field.name)
        if b"cell" in (field.metadata or {})
        else field
        for field in rows.schema
    ]
    return rows.cast(pa.schema(fields))


class BucketLoader:
    """The batches of one training, each of one shape; otherwise as `pipelines.loader.BatchLoader`.

    A cursor reads a unit for the rows of its own shape, so that a unit is read once an epoch for each of the
    shapes that it has.

    Args:
        table: a pinned snapshot.
        columns: those a batch has as tensors (see `pipelines.loader.to_batch`).
        global_batch: rows of a step, over all ranks.
        seed: of the order, and of the bucket of each step.
        settings: how rows are chosen; windows are of units that have rows of the bucket.
        counts: what `count_by_shape` gave.

    Raises:
        ValueError: if there is no row to train on.
    """

    def __init__(
        self,
        table: Table,
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

    def batches(self, start: int, *, rank: int = 0, world: int = 1, depth: int = 2) -> Prefetched[Batch]:
        """This rank's share of global batch `start`, `start` + 1, ... without end. To be closed."""
        return Prefetched(self._sequence(start, rank=rank, world=world), depth=depth)

    def held_out(self, *, rows: int, limit: int | None = None) -> Iterator[Batch]:
        """The held-out rows in batches of at most `rows` and of one shape, at most `limit` of them.

        Unit by unit in the table's own order; smaller shapes of a unit come first.
        """
        names = ["id", *self._columns, *SIDES]
        for unit in held_out_rows(self._table, names, fraction=self._held_out, limit=limit):
            sides = list(zip(*(unit[name].to_pylist() for name in SIDES), strict=True))
            for shape in sorted(set(sides)):
                mine = unit.filter(pa.array([side == shape for side in sides]))
                stated = of_one_shape(mine, shape=shape).select(["id", *self._columns])
                yield from to_batch(stated).split(rows)

    def _sequence(self, start: int, *, rank: int, world: int) -> Iterator[Batch]:
        came = Counter(self.bucket_at(step) for step in range(start))
        cursors: dict[Shape, Iterator[Batch]] = {}
        for step in itertools.count(start):
            shape = self.bucket_at(step)
            if shape not in cursors:
                cursors[shape] = self._loaders[shape].stream(came[shape], rank=rank, world=world)
            yield next(cursors[shape])
