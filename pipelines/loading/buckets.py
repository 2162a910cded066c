"""Loads a table whose rows differ in shape as batches of one shape each, with one cursor for each bucket.

All rows of a step have one shape. The shape of each step is drawn with the probability that a row of the
table has it. How far each cursor has come then follows from the position, so a restart needs no further
state, and in the mean every row is seen equally often. Epochs of a bucket follow each other without a seam: a
bucket with fewer rows than a batch repeats rows within one.
"""

from __future__ import annotations

import bisect
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Unpack

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.loading.loader import (
    BatchLoader,
    InterleavedLoader,
    LoaderOptions,
    UnitReader,
    UnitSubset,
    count_trainable,
    held_out_rows,
    is_held_out,
)
from pipelines.loading.rows import to_batch
from pipelines.stages.crop import Shape
from pipelines.storage.objects import IO_THREADS
from pipelines.tables.schemas import SIDE_COLUMNS, array_type
from pipelines.tables.table import Snapshot
from pipelines.tables.unit_files import UnitFile
from snapfusion.noise import noise_key, uniform
from snapfusion.training.batch import Batch

RowCount = int | Mapping[Shape, int]
"""Rows of a unit to train on; by shape, if the rows differ in shape."""


def count_training_rows(table: Snapshot, *, held_out: float) -> Sequence[RowCount]:
    """The rows to train on of each unit of LATENTS or TARGETS."""
    if is_bucketed(table.identity):
        return count_by_shape(table, held_out=held_out)
    return count_trainable(table, held_out=held_out)


def is_bucketed(identity: Mapping[str, Any]) -> bool:
    """Whether rows differ in shape in LATENTS of this identity, or in TARGETS made from them."""
    latents = identity.get("latents", identity)
    return latents["images"].get("buckets") is not None


def count_by_shape(table: UnitReader, *, held_out: float) -> list[Mapping[Shape, int]]:
    """The rows to train on of each unit, by height and width. Reads ids and sides."""

    def count(unit: UnitFile) -> Mapping[Shape, int]:
        rows = table.read_unit(unit, ["id", *SIDE_COLUMNS])
        ids, *sides = (rows[name].to_pylist() for name in ("id", *SIDE_COLUMNS))
        shapes = zip(*sides, strict=True)
        if not held_out:
            return Counter(shapes)
        kept = (not is_held_out(row_id, fraction=held_out) for row_id in ids)
        return Counter(itertools.compress(shapes, kept))

    with ThreadPoolExecutor(IO_THREADS) as readers:
        return list(readers.map(count, table.units))


def total_rows(count: RowCount) -> int:
    """Rows of all shapes."""
    return count if isinstance(count, int) else sum(count.values())


def make_loader(
    table: UnitReader, *, seed: int, counts: Sequence[RowCount], **options: Unpack[LoaderOptions]
) -> TableLoader:
    """The loader of a table: by bucket, if `counts` (see `count_training_rows`) are by shape.

    Raises:
        ValueError: if there are no rows to train on.
    """
    by_shape = any(not isinstance(count, int) for count in counts)
    loader: Callable[..., TableLoader] = BucketLoader if by_shape else BatchLoader
    return loader(table, seed=seed, counts=counts, **options)


@dataclass(frozen=True, kw_only=True)
class Bucket(UnitSubset):
    """The rows of one shape, as a table. Its units are those of `table` that have such rows."""

    shape: Shape

    def read_unit(self, unit: UnitFile, columns: Sequence[str] | None = None) -> pa.Table:
        """The unit's rows of this shape, with that shape in their fields."""
        with_sides = None if columns is None else list(dict.fromkeys([*columns, *SIDE_COLUMNS]))
        rows = self.table.read_unit(unit, with_sides)
        sides = zip(SIDE_COLUMNS, self.shape, strict=True)
        height, width = (pc.equal(rows[name], side) for name, side in sides)
        rows = with_shape(rows.filter(pc.and_(height, width)), shape=self.shape)
        return rows if columns is None else rows.select(columns)


def with_shape(rows: pa.Table, *, shape: Shape) -> pa.Table:
    """Rows that all have this shape, with that shape in their fields."""
    height, width = shape
    fields = [
        array_type(field).for_image(height=height, width=width).field(field.name)
        if b"cell" in (field.metadata or {})
        else field
        for field in rows.schema
    ]
    return rows.cast(pa.schema(fields))


class BucketLoader(InterleavedLoader[Shape]):
    """The batches of one training, each of one shape; otherwise as `BatchLoader`.

    A cursor reads a unit for the rows of its own shape, so a unit is read once an epoch for each shape in it.

    Args:
        table: a pinned snapshot.
        seed: of the order, and of the bucket of each step.
        counts: the result of `count_by_shape`.
        options: as of `BatchLoader`; windows are of units that have rows of the bucket.

    Raises:
        ValueError: if there are no rows to train on.
    """

    def __init__(
        self,
        table: UnitReader,
        *,
        seed: int,
        counts: Sequence[Mapping[Shape, int]],
        **options: Unpack[LoaderOptions],
    ) -> None:
        self._table, self._seed = table, seed
        self._columns, self._held_out = options["columns"], options["settings"].held_out
        # A sum of counters leaves out shapes of which no row is trained on.
        rows: Counter[Shape] = sum(map(Counter, counts), Counter())
        self._shapes = sorted(rows)
        self._ends = list(itertools.accumulate(rows[shape] for shape in self._shapes))
        if not self._shapes:
            raise ValueError("there are no rows to train on; the table is empty, or all of it is held out")
        self.loaders: dict[Shape, BatchLoader] = {}
        for shape in self._shapes:
            indices = [index for index, count in enumerate(counts) if count.get(shape)]
            self.loaders[shape] = BatchLoader(
                Bucket(table=table, shape=shape, units=[table.units[index] for index in indices]),
                seed=noise_key("bucket", seed, *shape),
                counts=[counts[index][shape] for index in indices],
                **options,
            )

    def key_at(self, step: int) -> Shape:
        """The height and width of all images of a step."""
        # A draw of its own for each step, of which no state remains.
        draw = float(uniform(noise_key("bucket", self._seed, step), 1)[0])
        return self._shapes[bisect.bisect_right(self._ends, int(draw * self._ends[-1]))]

    def held_out(self, *, rows: int, limit: int | None = None) -> Iterator[Batch]:
        """The held-out rows in batches of at most `rows` and of one shape, at most `limit` of them.

        Unit by unit in the table's order; smaller shapes of a unit come first.
        """
        names = ["id", *self._columns, *SIDE_COLUMNS]
        for unit in held_out_rows(self._table, names, fraction=self._held_out, limit=limit):
            sides = list(zip(*(unit[name].to_pylist() for name in SIDE_COLUMNS), strict=True))
            for shape in sorted(set(sides)):
                of_shape = unit.filter(pa.array([side == shape for side in sides]))
                batch = to_batch(with_shape(of_shape, shape=shape).select(["id", *self._columns]))
                yield from batch.split(rows)


TableLoader = BatchLoader | BucketLoader
"""The loader of a table whose rows have one shape, or several."""
