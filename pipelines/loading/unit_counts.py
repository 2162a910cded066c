"""Counts the rows that a training reads of each unit, by the keys that are kept with the units.

Only of units whose row of `.units` lacks them, as those of earlier versions do, is the data file opened.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import numpy as np

from pipelines.loading.buckets import RowCount, count_by_shape, is_bucketed
from pipelines.loading.loader import UnitSubset, count_trainable
from pipelines.tables.row_keys import LARGEST_FRACTION, count_held_out, count_shapes
from pipelines.tables.table import Snapshot


def count_rows_to_train(table: Snapshot, *, held_out: float) -> Sequence[RowCount]:
    """The rows to train on of each unit of LATENTS, TARGETS or PAIRS, in the order of the units.

    Args:
        table: a pinned snapshot.
        held_out: fraction of the rows that is kept for evaluation.
    """
    # PAIRS have one shape, and no image settings in their identity to tell buckets by.
    bucketed = table.identity["kind"] != "pairs" and is_bucketed(table.identity)
    if held_out == 0.0 and not bucketed:
        rows: list[int] = table.units.rows.tolist()
        return rows
    counts: list[RowCount | None] = [None] * len(table.units)
    if held_out <= LARGEST_FRACTION:
        counts = _count_shapes(table, held_out) if bucketed else _count(table, held_out)
    if None in counts:
        unknown = [index for index, count in enumerate(counts) if count is None]
        subset = UnitSubset(table=table, units=list(table.units.take(np.array(unknown))))
        count: Callable[..., Sequence[RowCount]] = count_by_shape if bucketed else count_trainable
        for index, counted in zip(unknown, count(subset, held_out=held_out), strict=True):
            counts[index] = counted
    return cast("list[RowCount]", counts)


def _count(table: Snapshot, held_out: float) -> list[RowCount | None]:
    keys = table.recorded(["held_out_keys"])["held_out_keys"].combine_chunks()
    counts: list[RowCount | None] = (table.units.rows - count_held_out(keys, fraction=held_out)).tolist()
    for index in np.flatnonzero(keys.is_null().to_numpy(False)).tolist():
        counts[index] = None
    return counts


def _count_shapes(table: Snapshot, held_out: float) -> list[RowCount | None]:
    recorded = table.recorded(["held_out_keys", "shapes"])
    columns = (recorded[name].to_pylist() for name in ("held_out_keys", "shapes"))
    return [
        None if keys is None or shapes is None else count_shapes(keys, shapes, fraction=held_out)
        for keys, shapes in zip(*columns, strict=True)
    ]
