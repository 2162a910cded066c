"""Rows that are brought together by what they have in common, by Ray Data's own shuffle.

Beside execution.py this is the other place that knows Ray Data. There a unit is one thing that is never cut;
here rows are numbers, as many as there are, and go to whoever has the others of their group. The driver holds
references to blocks, never rows.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, Self

import pyarrow as pa
import ray
from ray.data import DataContext
from ray.data.context import (
    DEFAULT_TARGET_MAX_BLOCK_SIZE,
    DEFAULT_TARGET_MIN_BLOCK_SIZE,
    ShuffleStrategy,
)

TableFunction = Callable[[pa.Table], pa.Table]

_MOST_BLOCKS = 1000


class Rows(Protocol):
    """Tables of one schema, of which nobody knows the order. A table of no row is given to no function."""

    def map(self, function: TableFunction) -> Self:
        """What `function` makes of each table by itself."""
        ...

    def grouped(self, function: TableFunction, *, by: str) -> Self:
        """What `function` makes of each group: all rows that have the same number in column `by`."""
        ...

    def union(self, other: Self) -> Self:
        """These rows and those."""
        ...

    def tables(self) -> Iterator[pa.Table]:
        """All of them, here; for what is small."""
        ...


Read = Callable[[Sequence[Any], Callable[[Any], pa.Table]], Rows]
"""Makes rows of things that pickle: each becomes a table. `read_on_ray` is the one that jobs use."""


class RayRows:
    """`Rows` of a Ray dataset."""

    def __init__(self, dataset: ray.data.Dataset) -> None:
        self.dataset = dataset

    def map(self, function: TableFunction) -> RayRows:
        """What `function` makes of each block."""

        def unless_empty(table: pa.Table) -> pa.Table:
            # A block that nobody put a row into has no columns either.
            return function(table) if table.num_rows else table

        return RayRows(self.dataset.map_batches(unless_empty, batch_size=None, batch_format="pyarrow"))

    def grouped(self, function: TableFunction, *, by: str) -> RayRows:
        """What `function` makes of each group, made at once, so that one shuffle runs at a time."""
        groups = self.dataset.groupby(by).map_groups(function, batch_format="pyarrow")
        return RayRows(groups.materialize())

    def union(self, other: RayRows) -> RayRows:
        """These rows and those."""
        return RayRows(self.dataset.union(other.dataset))

    def tables(self) -> Iterator[pa.Table]:
        """The blocks, one at a time."""
        batches: Iterable[Any] = self.dataset.iter_batches(batch_size=None, batch_format="pyarrow")
        yield from (table for table in batches if table.num_rows)


def read_on_ray(things: Sequence[Any], read: Callable[[Any], pa.Table]) -> RayRows:
    """`Read` as tasks of the cluster that this process is connected to."""
    items = [{"thing": pickle.dumps(thing)} for thing in things]

    def table(batch: pa.Table) -> pa.Table:
        return pa.concat_tables([read(pickle.loads(thing)) for thing in batch.column("thing").to_pylist()])

    with DataContext.current(_context()):
        dataset = ray.data.from_items(items, override_num_blocks=min(len(items), _MOST_BLOCKS))
        return RayRows(dataset.map_batches(table, batch_size=None, batch_format="pyarrow"))


def _context() -> DataContext:
    """Ray Data's own settings, and not those under which units are streamed (a block of its own for each)."""
    context = DataContext.get_current().copy()
    context.target_max_block_size = DEFAULT_TARGET_MAX_BLOCK_SIZE
    context.target_min_block_size = DEFAULT_TARGET_MIN_BLOCK_SIZE
    context.enable_progress_bars = False
    # By tasks, which are done again when they are lost. The shuffles by hash hold partitions in actors: on
    # two cores they took 15 s for what takes 1 s so, and an actor that dies takes the job with it.
    context.shuffle_strategy = ShuffleStrategy.SORT_SHUFFLE_PULL_BASED
    return context
