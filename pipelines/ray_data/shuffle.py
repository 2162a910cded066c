"""Groups rows by key with Ray Data's shuffle.

In `execution` a unit is one item that is never cut; here rows are rows of Arrow tables, and those of a group
are brought together. The driver holds references to blocks, never rows.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, Self

import pyarrow as pa
import ray
from ray.data import DataContext
from ray.data.context import DEFAULT_TARGET_MAX_BLOCK_SIZE, DEFAULT_TARGET_MIN_BLOCK_SIZE, ShuffleStrategy

TableFunction = Callable[[pa.Table], pa.Table]

_MAX_BLOCKS = 1000


class Rows(Protocol):
    """Tables of one schema in unknown order. Functions are never called with an empty table."""

    def map(self, function: TableFunction) -> Self:
        """Apply `function` to each table."""

    def grouped(self, function: TableFunction, *, by: str) -> Self:
        """Apply `function` to each group: all rows with the same number in column `by`."""

    def union(self, other: Self) -> Self:
        """These rows and those."""

    def tables(self) -> Iterator[pa.Table]:
        """All tables, in this process; for small results."""


Read = Callable[[Sequence[Any], Callable[[Any], pa.Table]], Rows]
"""Reads picklable inputs, each to a table; jobs use `read_on_ray`."""


class RayRows:
    """`Rows` of a Ray dataset."""

    def __init__(self, dataset: ray.data.Dataset) -> None:
        self.dataset = dataset

    def map(self, function: TableFunction) -> RayRows:
        """Apply `function` to each block."""

        def unless_empty(table: pa.Table) -> pa.Table:
            # An empty block has no columns either.
            return function(table) if table.num_rows else table

        return RayRows(self.dataset.map_batches(unless_empty, batch_size=None, batch_format="pyarrow"))

    def grouped(self, function: TableFunction, *, by: str) -> RayRows:
        """Apply `function` to each group, at once, so that one shuffle runs at a time."""
        groups = self.dataset.groupby(by).map_groups(function, batch_format="pyarrow")
        return RayRows(groups.materialize())

    def union(self, other: RayRows) -> RayRows:
        """These rows and those."""
        return RayRows(self.dataset.union(other.dataset))

    def tables(self) -> Iterator[pa.Table]:
        """The blocks, one at a time."""
        batches: Iterable[Any] = self.dataset.iter_batches(batch_size=None, batch_format="pyarrow")
        yield from (table for table in batches if table.num_rows)


def read_on_ray(inputs: Sequence[Any], read: Callable[[Any], pa.Table]) -> RayRows:
    """`Read` as tasks of the cluster that this process is connected to."""
    items = [{"input": pickle.dumps(one)} for one in inputs]

    def table(batch: pa.Table) -> pa.Table:
        return pa.concat_tables([read(pickle.loads(one)) for one in batch.column("input").to_pylist()])

    with DataContext.current(_context()):
        dataset = ray.data.from_items(items, override_num_blocks=min(len(items), _MAX_BLOCKS))
        return RayRows(dataset.map_batches(table, batch_size=None, batch_format="pyarrow"))


def _context() -> DataContext:
    """Ray Data's own settings instead of those of `run_on_ray`, which makes each unit a block."""
    context = DataContext.get_current().copy()
    context.target_max_block_size = DEFAULT_TARGET_MAX_BLOCK_SIZE
    context.target_min_block_size = DEFAULT_TARGET_MIN_BLOCK_SIZE
    context.enable_progress_bars = False
    # Runs as tasks, which Ray repeats if they are lost. Hash shuffles keep partitions in actors: on two cores
    # they took 15 s instead of 1 s, and an actor that dies ends the job.
    context.shuffle_strategy = ShuffleStrategy.SORT_SHUFFLE_PULL_BASED
    return context
