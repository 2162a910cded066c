"""The rows of a unit in memory, and batches of tensors gathered from several units.

A batch takes few rows of each of many units. They are copied one by one from where the file was read to, and
nothing else of the units is touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipelines.tables.schemas import array_type, from_png
from snapfusion.training.batch import Batch

_CHUNK_BYTES: Final = 128 << 10
"""Values gathered before they are converted: they are still in the processor's cache then."""


class LoaderError(ValueError):
    """A row that cannot be decoded, or a table that has changed since its rows were counted."""


class UnitRows:
    """The rows of a unit to train on.

    Attributes:
        num_rows: their number.

    Args:
        table: all rows of the unit, with their ids.
        kept: indices of the rows to train on, in their order; None for all of them.
    """

    def __init__(self, table: pa.Table, *, kept: Sequence[int] | None = None) -> None:
        self.table = table
        self._kept = range(table.num_rows) if kept is None else kept
        self.num_rows = len(self._kept)
        self.ids: list[str] = table["id"].to_pylist()
        self.values = {field.name: _values(table[field.name], field) for field in table.schema}

    def index(self, row: int) -> int:
        """Where a row to train on is among all rows of the unit."""
        return self._kept[row]


def gather(units: Sequence[UnitRows], rows: Sequence[int]) -> Batch:
    """The batch whose row i is row `rows[i]` of those to train on in `units[i]`; decoded as by `to_batch`.

    Raises:
        LoaderError: as `to_batch`.
    """
    at = [unit.index(row) for unit, row in zip(units, rows, strict=True)]
    ids = tuple([unit.ids[row] for unit, row in zip(units, at, strict=True)])
    fields = [field for field in units[0].table.schema if field.name != "id"]
    return Batch(ids=ids, columns={field.name: _gather(units, at, field, ids=ids) for field in fields})


def to_batch(rows: pa.Table) -> Batch:
    """Decode rows to tensors.

    arrays (binary, its field stating shape and dtype)   float32 [B, *shape] of floats, int64 of integers
    PNG images (binary, its field stating format png)    uint8 [B,3,H,W]
    numbers                                              [B] in their own dtype

    Raises:
        LoaderError: if a row lacks a column, or a value has another form or cannot be decoded.
    """
    ids = tuple(rows["id"].to_pylist())
    fields = [field for field in rows.schema if field.name != "id"]
    return Batch(ids=ids, columns={field.name: _decode(rows[field.name], field, ids=ids) for field in fields})


def _values(column: pa.ChunkedArray, field: pa.Field) -> np.ndarray | None:
    """The values of a column as one array, not copied; None for images, or if one is missing or malformed.

    Such a row is an error only where it is used.
    """
    if column.null_count or _is_png(field):
        return None
    try:
        if pa.types.is_binary(field.type):
            return array_type(field).unpack_column(column)
        if pa.types.is_integer(field.type) or pa.types.is_floating(field.type):
            return column.to_numpy()
    except ValueError:
        pass
    return None


def _gather(units: Sequence[UnitRows], rows: Sequence[int], field: pa.Field, *, ids: Sequence[str]) -> Tensor:
    """One column of a batch."""
    values = [unit.values[field.name] for unit in units]
    arrays = [array for array in values if array is not None]
    # Of one form: NumPy would stretch a value of another shape to fit.
    if len(arrays) == len(values) and len({(array.shape[1:], array.dtype) for array in arrays}) == 1:
        return _stack(arrays, rows, widened=pa.types.is_binary(field.type))
    cells = [unit.table[field.name][row].as_py() for unit, row in zip(units, rows, strict=True)]
    return _decode(pa.chunked_array([pa.array(cells, field.type)]), field, ids=ids)


def _stack(arrays: Sequence[np.ndarray], rows: Sequence[int], *, widened: bool) -> Tensor:
    """Row `rows[i]` of `arrays[i]`, stacked; `widened` to float32 or int64."""
    first = arrays[0]
    shape, chunk = first.shape[1:], max(1, _CHUNK_BYTES // max(1, first[:1].nbytes))
    scratch = np.empty((min(chunk, len(rows)), *shape), first.dtype)
    kind = _wide_type(scratch) if widened else torch.from_numpy(scratch).dtype
    stacked = torch.empty((len(rows), *shape), dtype=kind)
    for start in range(0, len(rows), len(scratch)):
        stop = min(start + len(scratch), len(rows))
        for position in range(start, stop):
            scratch[position - start] = arrays[position][rows[position]]
        stacked[start:stop] = torch.from_numpy(scratch[: stop - start])
    return stacked


def _wide_type(values: np.ndarray) -> torch.dtype:
    return torch.float32 if values.dtype.kind == "f" else torch.int64


def _is_png(field: pa.Field) -> bool:
    return bool((field.metadata or {}).get(b"format") == b"png")


def _decode(column: pa.ChunkedArray, field: pa.Field, *, ids: Sequence[str]) -> Tensor:
    if column.null_count:
        missing = ids[column.is_null().index(True).as_py()]
        raise LoaderError(f"row {missing} has no {field.name}, which this training needs")
    try:
        if _is_png(field):
            images = [torch.from_numpy(from_png(data).copy()) for data in column.to_pylist()]
            return torch.stack(images).permute(0, 3, 1, 2).contiguous()
        if pa.types.is_binary(field.type):
            values = array_type(field).unpack_column(column)
            # torch converts float16 three times as fast as NumPy; the values are equal.
            return torch.from_numpy(values.copy()).to(_wide_type(values))
        return torch.from_numpy(column.to_numpy().copy())
    except (ValueError, OSError, TypeError, RuntimeError) as error:
        raise LoaderError(f"column {field.name} of rows {ids[0]} .. {ids[-1]}: {error}") from error
