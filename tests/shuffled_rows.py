"""`Rows` in this process, cut and shuffled at random as Ray does."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa


class ShuffledRows:
    """Tables of one schema, in an order that follows from the seed."""

    def __init__(self, tables: list[pa.Table], *, seed: int) -> None:
        self.random = random.Random(seed)
        self.seed = seed
        self.parts = [self._shuffled(part) for table in tables for part in self._cut(table)]
        self.random.shuffle(self.parts)

    def _cut(self, table: pa.Table) -> list[pa.Table]:
        edges = sorted({0, table.num_rows, *(self.random.randint(0, table.num_rows) for _ in range(2))})
        return [table.slice(a, b - a) for a, b in itertools.pairwise(edges)] or [table]

    def _shuffled(self, table: pa.Table) -> pa.Table:
        order = list(range(table.num_rows))
        self.random.shuffle(order)
        return table.take(pa.array(order, pa.int64()))

    def map(self, function: Callable[[pa.Table], pa.Table]) -> ShuffledRows:
        results = [function(table) if table.num_rows else table for table in self.parts]
        return ShuffledRows([table for table in results if table.num_rows] or results[:1], seed=self.seed + 1)

    def grouped(self, function: Callable[[pa.Table], pa.Table], *, by: str) -> ShuffledRows:
        whole = pa.concat_tables([table for table in self.parts if table.num_rows] or self.parts[:1])
        if not whole.num_rows:
            return self
        numbers = whole.column(by).to_numpy()
        groups = [self._shuffled(whole.filter(pa.array(numbers == number))) for number in np.unique(numbers)]
        return ShuffledRows([function(group) for group in groups], seed=self.seed + 1)

    def union(self, other: ShuffledRows) -> ShuffledRows:
        tables = [table for table in (*self.parts, *other.parts) if table.num_rows]
        return ShuffledRows(tables or self.parts[:1], seed=self.seed + 1)

    def tables(self) -> Iterator[pa.Table]:
        yield from (table for table in self.parts if table.num_rows)


def read_shuffled(seed: int):
    """A `pipelines.ray_data.shuffle.Read`."""

    def read(things: Sequence[Any], function: Callable[[Any], pa.Table]) -> ShuffledRows:
        return ShuffledRows([function(thing) for thing in things], seed=seed)

    return read
