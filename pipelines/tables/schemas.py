"""Schemas of the tables, and the encoding of their binary columns.

Arrays are stored as `binary` in C order, little-endian. The field's metadata states shape and dtype, and the
length of every value is checked when it is packed and when it is read.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from PIL import Image

SCHEMA_VERSION = 1

SIDE_COLUMNS = ("height", "width")
"""Columns of tables in buckets, whose rows differ in shape: the sides of the row's image, int32 pixels."""

_PNG = pa.field("image", pa.binary(), metadata={"format": "png"})


def _schema(*fields: pa.Field | tuple[str, pa.DataType]) -> pa.Schema:
    return pa.schema(fields)


def _columns(kind: pa.DataType, *names: str) -> list[pa.Field]:
    return [pa.field(name, kind) for name in names]


REJECTS = pa.schema(_columns(pa.string(), "unit", "id", "source", "reason", "detail"))
"""Rejected rows; they count if `unit` is committed in the main table."""

UNITS = _schema(
    *_columns(pa.string(), "unit", "source", "account"),
    *_columns(pa.int64(), "rows_read", "rows_written", "rows_rejected", "bytes"),
    ("sha256", pa.string()),
    ("seconds", pa.float64()),
    ("made_by", pa.string()),
    ("file", pa.string()),
    *_columns(pa.binary(), "held_out_keys", "shapes"),
)
"""One row a committed unit. `account` is its `UnitManifest` as JSON and `made_by` its `Origin`.

`seconds` and `made_by` differ between two runs of the same work, so they are not in the data file. `file` is
its name, and `held_out_keys` and `shapes` are its `RowKeys`; null in rows of earlier versions."""

FINGERPRINTS = _schema(
    *_columns(pa.string(), "id", "source_id"),
    *_columns(pa.int64(), "url_key", "caption_key"),
    ("image_sha256", pa.string()),
    ("phash", pa.int64()),
)
"""One row a usable row of a shard, or a caption or image of an evaluation: the keys that find its copies.

A key is null if the row lacks its input: no known URL, no letter in its caption, no caption."""

DUPLICATES = pa.schema(_columns(pa.string(), "id", "verdict", "of"))
"""One row a row of FINGERPRINTS: the reason to reject it, and the id of the earliest row that it copies.

Both are null for a row that copies none."""


@dataclass(frozen=True, kw_only=True)
class ArrayType:
    """The shape and dtype of a binary column's values.

    Attributes:
        shape: of each value; None for sides in which rows differ, as the last two of latents in buckets.
        dtype: of NumPy, with its byte order.
        cell: pixels of the image's side per element, if sides are None: the row's `height` and `width`, which
            are pixels, then give the shape.
    """

    shape: tuple[int | None, ...]
    dtype: str
    cell: int | None = None

    def field(self, name: str) -> pa.Field:
        """The Arrow field, with this type in its metadata."""
        shape = ",".join("*" if side is None else str(side) for side in self.shape)
        cell = {} if self.cell is None else {"cell": str(self.cell)}
        return pa.field(name, pa.binary(), metadata={"shape": shape, "dtype": self.dtype, **cell})

    def for_image(self, *, height: int, width: int) -> ArrayType:
        """The type for images of these sides, in pixels, with no side None."""
        if self.cell is None:
            return self
        return ArrayType(shape=(*self.shape[:-2], height // self.cell, width // self.cell), dtype=self.dtype)

    def pack(self, values: Sequence[np.ndarray] | np.ndarray) -> list[bytes]:
        """The bytes of each value, all of this shape.

        Raises:
            ValueError: if a shape differs.
        """
        for value in values:
            fits = len(value.shape) == len(self.shape) and all(
                side in (None, given) for side, given in zip(self.shape, value.shape, strict=True)
            )
            if not fits:
                raise ValueError(f"a value has shape {value.shape}; {self.shape} is accepted")
        return [np.ascontiguousarray(value, dtype=self.dtype).tobytes() for value in values]

    def unpack(self, values: Sequence[bytes]) -> np.ndarray:
        """The values as one array [B, *shape].

        Raises:
            ValueError: if a value's length differs, or a side is None (see `for_image`).
        """
        self._check_lengths([len(value) for value in values])
        return np.frombuffer(b"".join(values), dtype=self.dtype).reshape(len(values), *self.shape)

    def unpack_column(self, column: pa.ChunkedArray) -> np.ndarray:
        """As `unpack`, of a column without nulls, whose bytes are not copied value by value."""
        # Joining copies, also a single chunk.
        values = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
        _, offsets, data = values.buffers()
        starts = np.frombuffer(offsets or b"\0" * 4, np.int32)[
            values.offset : values.offset + len(values) + 1
        ]
        self._check_lengths(np.diff(starts).tolist())
        packed = np.frombuffer(data or b"", np.uint8)[starts[0] : starts[-1]]
        return packed.view(self.dtype).reshape(len(values), *self.shape)

    def _check_lengths(self, lengths: Sequence[int]) -> None:
        sides = [side for side in self.shape if side is not None]
        if len(sides) < len(self.shape):
            raise ValueError(f"rows differ in shape, {self.shape}; read rows of one shape at a time")
        expected = math.prod(sides) * np.dtype(self.dtype).itemsize
        for row, length in enumerate(lengths):
            if length != expected:
                raise ValueError(f"row {row} has {length} bytes, {self.dtype} {self.shape} has {expected}")


def array_type(field: pa.Field) -> ArrayType:
    """The type in a binary field's metadata.

    Raises:
        ValueError: if there is none.
    """
    metadata = {key.decode(): value.decode() for key, value in (field.metadata or {}).items()}
    if not {"shape", "dtype"} <= metadata.keys():
        raise ValueError(f"column {field.name!r} has no shape and dtype in its metadata")
    shape = tuple(None if side == "*" else int(side) for side in metadata["shape"].split(","))
    cell = int(metadata["cell"]) if "cell" in metadata else None
    return ArrayType(shape=shape, dtype=metadata["dtype"], cell=cell)


def read_array(rows: pa.Table, name: str) -> np.ndarray:
    """The values of a binary column whose rows have one shape."""
    return array_type(rows.schema.field(name)).unpack_column(rows[name])


def read_arrays(rows: pa.Table, name: str) -> list[np.ndarray]:
    """The values of a binary column, each in its row's shape.

    Raises:
        ValueError: if a value's length is not that of its shape.
    """
    type_, values = array_type(rows.schema.field(name)), rows[name].to_pylist()
    if type_.cell is None:
        return list(type_.unpack(values))
    sides = zip(*(rows[side].to_pylist() for side in SIDE_COLUMNS), strict=True)
    return [
        type_.for_image(height=height, width=width).unpack([value])[0]
        for value, (height, width) in zip(values, sides, strict=True)
    ]


def _latent(latent_shape: Sequence[int], *, dtype: str, cell: int | None) -> ArrayType:
    if cell is None:
        return ArrayType(shape=tuple(latent_shape), dtype=dtype)
    return ArrayType(shape=(*latent_shape[:-2], None, None), dtype=dtype, cell=cell)


def _sides(cell: int | None) -> list[pa.Field]:
    return [] if cell is None else _columns(pa.int32(), *SIDE_COLUMNS)


def _token_ids(num_tokens: int) -> pa.Field:
    return ArrayType(shape=(num_tokens,), dtype="<i4").field("token_ids")


def latents_schema(*, latent_shape: Sequence[int], num_tokens: int, cell: int | None = None) -> pa.Schema:
    """LATENTS: one row an image. `latent` is the posterior mean times the scaling factor.

    With `cell` each row has its own height and width, in pixels, which determine its latent's shape.
    """
    return _schema(
        *_columns(pa.string(), "id", "source_id", "caption"),
        _token_ids(num_tokens),
        _latent(latent_shape, dtype="<f2", cell=cell).field("latent"),
        *_sides(cell),
    )


def pairs_schema(*, latent_shape: Sequence[int], num_tokens: int) -> pa.Schema:
    """PAIRS: one row a (caption, draw); `image` is the teacher's decode as PNG, null if not stored."""
    return _schema(
        *_columns(pa.string(), "id", "source_id", "caption"),
        _token_ids(num_tokens),
        ("noise_key", pa.int64()),
        ("draw", pa.int32()),
        _latent(latent_shape, dtype="<f2", cell=None).field("latent"),
        _PNG,
    )


def targets_schema(
    *, latent_shape: Sequence[int], num_tokens: int, x_dtype: str, cell: int | None = None
) -> pa.Schema:
    """TARGETS: one row a (latent, draw); `w` is null in vanilla rows. SnapFusion Eq. 7-10.

    noise_key, interval, t, t2, k, w   the random draws: the noise is `snapfusion.noise.gaussian` of the key,
                                       from which interval and w follow too (`snapfusion.training.draws`)
    x_target                           the x with which one student step from t to t2 equals the teacher's k

    `cell` is that of LATENTS.
    """
    x_type = {"float16": "<f2", "float32": "<f4"}[x_dtype]
    return _schema(
        *_columns(pa.string(), "id", "source_id"),
        ("draw", pa.int32()),
        _token_ids(num_tokens),
        _latent(latent_shape, dtype="<f2", cell=cell).field("latent"),
        ("noise_key", pa.int64()),
        *_columns(pa.int32(), "interval", "t", "t2", "k"),
        ("w", pa.float32()),
        _latent(latent_shape, dtype=x_type, cell=cell).field("x_target"),
        *_sides(cell),
    )


def samples_schema(*, features: int, attributes: int, preferences: Sequence[str] = ()) -> pa.Schema:
    """SAMPLES: one row a (caption, guidance): the metrics of the generated image.

    features   float32, input of a Frechet distance
    clip       cosine of image and caption
    pickscore, hpsv2   scores of those of the two networks that `preferences` names
    right      whether each attribute is as the caption says, 0 or 1; no column if no oracle reads them
    image      PNG, null if not stored
    """
    return _schema(
        *_columns(pa.string(), "id", "source_id", "caption"),
        ("w", pa.float32()),
        ("noise_key", pa.int64()),
        ArrayType(shape=(features,), dtype="<f4").field("features"),
        ("clip", pa.float32()),
        *_columns(pa.float32(), *preferences),
        *([ArrayType(shape=(attributes,), dtype="|u1").field("right")] if attributes else []),
        _PNG,
    )


def references_schema(*, features: int) -> pa.Schema:
    """REFERENCES: one row a real image that generated ones are compared with: its features, float32."""
    return pa.schema([("id", pa.string()), ArrayType(shape=(features,), dtype="<f4").field("features")])


def to_png(image: np.ndarray) -> bytes:
    """A uint8 image [H,W,3] as PNG: lossless, and the same bytes for the same pixels."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", compress_level=3)
    return buffer.getvalue()


def from_png(data: bytes) -> np.ndarray:
    """A PNG as uint8 [H,W,3]."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))
