"""The keys that decide which rows are held out of a training, kept with each unit.

A row is held out at a fraction f if the key of its id lies in the last f of the range of keys. The highest
keys of a unit's rows are in its row of `.units`: a training counts its rows by them and opens no data file.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.tables.schemas import SIDE_COLUMNS
from snapfusion.noise import noise_key

LARGEST_FRACTION: Final = 1 / 16
"""The largest held-out fraction whose keys are kept; at a larger one the ids are read."""

_KEY_TYPE: Final = np.dtype("<i8")
_SHAPE_TYPE: Final = np.dtype("<i4")
_TRAINED_COLUMN: Final = "latent"


def held_out_key(row_id: str) -> int:
    """The key of a row by which it is held out, in [0, 2^63)."""
    return noise_key("held out", row_id)


def least_key(fraction: float) -> int:
    """The least key of a held-out row."""
    # The last part of the range, so a larger fraction keeps all rows of a smaller one.
    return math.ceil((1.0 - fraction) * 2.0**63)


@dataclass(frozen=True, kw_only=True)
class RowKeys:
    """The highest keys of a unit's rows.

    Attributes:
        keys: those of `LARGEST_FRACTION`, int64 little-endian; of one shape after the other.
        shapes: of rows that differ in shape, int32 [shapes, 4] in C order: height and width in pixels, rows
            of this shape, and how many of the keys are theirs. None if all rows have one shape.
    """

    keys: bytes
    shapes: bytes | None

    @classmethod
    def of_rows(cls, rows: pa.Table) -> RowKeys | None:
        """The keys of a unit's rows; None for a table that no training reads."""
        if _TRAINED_COLUMN not in rows.column_names:
            return None
        keys = list(map(held_out_key, rows["id"].to_pylist()))
        if SIDE_COLUMNS[0] not in rows.column_names:
            return cls(keys=_packed(keys), shapes=None)
        by_shape = defaultdict[tuple[int, int], list[int]](list)
        for height, width, key in zip(*(rows[name].to_pylist() for name in SIDE_COLUMNS), keys, strict=True):
            by_shape[height, width].append(key)
        packed = {shape: _packed(by_shape[shape]) for shape in sorted(by_shape)}
        shapes = [
            [*shape, len(by_shape[shape]), len(highest) // _KEY_TYPE.itemsize]
            for shape, highest in packed.items()
        ]
        return cls(keys=b"".join(packed.values()), shapes=np.array(shapes, _SHAPE_TYPE).tobytes())

    @classmethod
    def of_file(cls, data: bytes) -> RowKeys | None:
        """The keys of the rows in a data file of this content."""
        file = pq.ParquetFile(pa.BufferReader(data))
        needed = {"id", *SIDE_COLUMNS}
        if _TRAINED_COLUMN not in file.schema_arrow.names:
            return None
        rows = file.read([name for name in file.schema_arrow.names if name in needed])
        # The trained column itself is not needed, only that there is one.
        return cls.of_rows(rows.append_column(_TRAINED_COLUMN, pa.nulls(rows.num_rows)))


def _packed(keys: list[int]) -> bytes:
    least = least_key(LARGEST_FRACTION)
    return np.array(sorted(key for key in keys if key >= least), _KEY_TYPE).tobytes()


def count_held_out(keys: pa.BinaryArray, *, fraction: float) -> np.ndarray:
    """How many keys of each value, as `RowKeys` packs them, are of held-out rows: int64 [n]; of a null 0."""
    if not len(keys):
        return np.zeros(0, np.int64)
    offsets = np.frombuffer(keys.buffers()[1], np.int32)[keys.offset : keys.offset + len(keys) + 1]
    data = keys.buffers()[2]
    flat = np.frombuffer(data if data is not None else b"", np.uint8)[offsets[0] : offsets[-1]]
    is_held_out = flat.view(_KEY_TYPE) >= least_key(fraction)
    before = np.concatenate([[0], np.cumsum(is_held_out)])
    return np.diff(before[(offsets - offsets[0]) // _KEY_TYPE.itemsize])


def count_shapes(keys: bytes, shapes: bytes, *, fraction: float) -> dict[tuple[int, int], int]:
    """The rows of a unit that are not held out, by height and width; no shape without such a row."""
    values, least, first = np.frombuffer(keys, _KEY_TYPE), least_key(fraction), 0
    counts: dict[tuple[int, int], int] = {}
    for height, width, rows, kept in np.frombuffer(shapes, _SHAPE_TYPE).reshape(-1, 4).tolist():
        held_out = int((values[first : first + kept] >= least).sum())
        first += kept
        if rows > held_out:
            counts[height, width] = rows - held_out
    return counts
