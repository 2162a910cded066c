"""A table in memory for loaders, and what a loader yields."""

import itertools
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from pipelines.tables.unit_files import UnitList


class MemoryTable:
    """Units by name; remembers which were read."""

    def __init__(self, tables: Mapping[str, pa.Table]) -> None:
        self.tables = dict(sorted(tables.items()))
        names = pa.array([f"{name}.parquet" for name in self.tables], pa.string())
        rows = pa.array([table.num_rows for table in self.tables.values()], pa.int64())
        self.units = UnitList.in_order("memory", names=names, rows=rows, sizes=rows)
        self.read: list[str] = []

    def read_unit(self, unit: Any, columns: list[str] | None = None) -> pa.Table:
        if columns != ["id"]:
            self.read.append(unit.unit)
        rows = self.tables[unit.unit]
        return rows if columns is None else rows.select(columns)


def take(loader: Any, *, start: int = 0, count: int = 20, rank: int = 0, world: int = 1) -> list[Any]:
    """Some batches of a loader."""
    batches = loader.batches(start, rank=rank, world=world)
    try:
        return list(itertools.islice(batches, count))
    finally:
        batches.close()


def ids(loader: Any, **options: int) -> list[tuple[str, ...]]:
    """The ids of some batches of a loader."""
    return [batch.ids for batch in take(loader, **options)]
