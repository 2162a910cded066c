"""The columns of each kind of table, and the bytes behind its binary columns.

Arrays are stored as `binary` in C order, little-endian; the field's metadata states shape and dtype, and
every value's length is checked when it is packed and when it is read.
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
"""Columns of tables whose rows have shapes of their own: sides of the row's picture, int32 pixels."""

REJECTS = pa.schema(
    [
        ("unit", pa.string()),
        ("id", pa.string()),
        ("source", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)
"""Rows set aside; they count when `unit` is committed in the main table."""

UNITS = pa.schema(
    [
        ("unit", pa.string()),
        ("source", pa.string()),
        ("account", pa.string()),
        ("rows_read", pa.int64()),
        ("rows_written", pa.int64()),
        ("rows_rejected", pa.int64()),
        ("bytes", pa.int64()),
        ("sha256", pa.string()),
        ("seconds", pa.float64()),
        ("made_by", pa.string()),
    ]
)
"""One row a committed unit: what its data file says of itself, its hash, the seconds it took, and `Origin`.

The last two differ between two runs of the same work, so they are here and not in the data file."""


FINGERPRINTS = pa.schema(
    [
        ("id", pa.string()),
        ("source_id", pa.string()),
        ("url_key", pa.int64()),
        ("caption_key", pa.int64()),
        ("image_sha256", pa.string()),
        ("phash", pa.int64()),
    ]
)
"""One row a usable row of a shard, or a caption or picture of an evaluation: what it is told from others by.

Null where a row has no such thing: no known address, no letter in its caption, no caption at all."""

DUPLICATES = pa.schema([("id", pa.string()), ("verdict", pa.string()), ("of", pa.string())])
"""One row a row of FINGERPRINTS: the reason why it is refused, and the id of the earliest row that it copies.

Both are null for a row that copies none."""


@dataclass(frozen=True, kw_only=True)
class ArrayType:
    """The shape and dtype of a binary column's values.

    Attributes:
        shape: of each value; None where the rows differ, as the last two sides of latents in buckets do.
        dtype: of NumPy, its byte order stated.
        cell: where sides are open, the pixels of a picture's side behind one element: `height` and `width`
            of the row, which are pixels, tell the shape.
    """

    shape: tuple[int | None, ...]
    dtype: str
    cell: int | None = None

    def field(self, name: str) -> pa.Field:
        """The Arrow field, its metadata stating all this."""
        shape = ",".join("*" if side is None else str(side) for side in self.shape)
        cell = {} if self.cell is None else {"cell": str(self.cell)}
        return pa.field(name, pa.binary(), metadata={"shape": shape, "dtype": self.dtype, **cell})

    def of_picture(self, *, height: int, width: int) -> ArrayType:
        """The one shape that belongs to pictures of these sides, in pixels; this, if no side is open."""
        if self.cell is None:
            return self
        return ArrayType(shape=(*self.shape[:-2], height // self.cell, width // self.cell), dtype=self.dtype)

    def pack(self, values: Sequence[np.ndarray] | np.ndarray) -> list[bytes]:
        """Each of the values, which are of this shape.

        Raises:
            ValueError: if a shape differs.
        """
        for value in values:
            fits = len(value.shape) == len(self.shape) and all(
                side in (None, given) for side, given in zip(self.shape, value.shape, strict=True)
            )
            if not fits:
                raise ValueError(f"values of shape {value.shape} given, {self.shape} is accepted")
        return [np.ascontiguousarray(value, dtype=self.dtype).tobytes() for value in values]

    def unpack(self, values: Sequence[bytes]) -> np.ndarray:
        """The values as one array [B, *shape].

        Raises:
            ValueError: if a value's length differs, or a side is open (see `of_picture`).
        """
        sides = [side for side in self.shape if side is not None]
        if len(sides) < len(self.shape):
            raise ValueError(f"the rows have shapes of their own, {self.shape}; read those of one shape")
        expected = math.prod(sides) * np.dtype(self.dtype).itemsize
        for row, value in enumerate(values):
            if len(value) != expected:
                raise ValueError(
                    f"row {row} has {len(value)} bytes, {self.dtype} {self.shape} has {expected}"
                )
        return np.frombuffer(b"".join(values), dtype=self.dtype).reshape(len(values), *sides)


def array_type(field: pa.Field) -> ArrayType:
    """What a binary field's metadata states.

    Raises:
        ValueError: if the field states nothing.
    """
    stated = field.metadata or {}
    if b"shape" not in stated or b"dtype" not in stated:
        raise ValueError(f"column {field.name!r} states no shape and dtype")
    shape = tuple(None if side == "*" else int(side) for side in stated[b"shape"].decode().split(","))
    cell = int(stated[b"cell"]) if b"cell" in stated else None
    return ArrayType(shape=shape, dtype=stated[b"dtype"].decode(), cell=cell)


def read_arrays(rows: pa.Table, name: str) -> list[np.ndarray]:
    """The values of a binary column, each of its row's shape.

    Raises:
        ValueError: if a value's length is not that of its shape.
    """
    kind, values = array_type(rows.schema.field(name)), rows[name].to_pylist()
    if kind.cell is None:
        return list(kind.unpack(values))
    sides = zip(*(rows[side].to_pylist() for side in SIDE_COLUMNS), strict=True)
    return [
        kind.of_picture(height=height, width=width).unpack([value])[0]
        for value, (height, width) in zip(values, sides, strict=True)
    ]


def _latent(latent_shape: Sequence[int], *, dtype: str, cell: int | None) -> ArrayType:
    if cell is None:
        return ArrayType(shape=tuple(latent_shape), dtype=dtype)
    return ArrayType(shape=(*latent_shape[:-2], None, None), dtype=dtype, cell=cell)


def _sides(cell: int | None) -> list[tuple[str, pa.DataType]]:
    return [] if cell is None else [(side, pa.int32()) for side in SIDE_COLUMNS]


def latents_schema(*, latent_shape: Sequence[int], num_tokens: int, cell: int | None = None) -> pa.Schema:
    """LATENTS: one row an image. `latent` is the posterior mean times the scaling factor.

    With `cell` each row has its own height and width, in pixels, of which its latent's follow.
    """
    return pa.schema(
        [
            ("id", pa.string()),
            ("source_id", pa.string()),
            ("caption", pa.string()),
            ArrayType(shape=(num_tokens,), dtype="<i4").field("token_ids"),
            _latent(latent_shape, dtype="<f2", cell=cell).field("latent"),
            *_sides(cell),
        ]
    )


def pairs_schema(*, latent_shape: Sequence[int], num_tokens: int) -> pa.Schema:
    """PAIRS: one row a (caption, draw); `image` is the teacher's decode as PNG, null if left out."""
    return pa.schema(
        [
            ("id", pa.string()),
            ("source_id", pa.string()),
            ("caption", pa.string()),
            ArrayType(shape=(num_tokens,), dtype="<i4").field("token_ids"),
            ("noise_key", pa.int64()),
            ("draw", pa.int32()),
            ArrayType(shape=tuple(latent_shape), dtype="<f2").field("latent"),
            pa.field("image", pa.binary(), metadata={"format": "png"}),
        ]
    )


def targets_schema(
    *, latent_shape: Sequence[int], num_tokens: int, x_dtype: str, cell: int | None = None
) -> pa.Schema:
    """TARGETS: one row a (latent, draw); `w` is null in vanilla rows. SnapFusion Eq. 7-10.

    noise_key, interval, t, t2, k, w   what was drawn: the noise is `snapfusion.noise.gaussian` of the key;
                                       interval and w follow from it too (`snapfusion.training.draws`)
    x_target                           the x that lands one student step from t to t2 on the teacher's k

    `cell` is that of the LATENTS.
    """
    x_type = {"float16": "<f2", "float32": "<f4"}[x_dtype]
    return pa.schema(
        [
            ("id", pa.string()),
            ("source_id", pa.string()),
            ("draw", pa.int32()),
            ArrayType(shape=(num_tokens,), dtype="<i4").field("token_ids"),
            _latent(latent_shape, dtype="<f2", cell=cell).field("latent"),
            ("noise_key", pa.int64()),
            ("interval", pa.int32()),
            ("t", pa.int32()),
            ("t2", pa.int32()),
            ("k", pa.int32()),
            ("w", pa.float32()),
            _latent(latent_shape, dtype=x_type, cell=cell).field("x_target"),
            *_sides(cell),
        ]
    )


def samples_schema(*, features: int, attributes: int) -> pa.Schema:
    """SAMPLES: one row a (caption, guidance): what the judges said of the picture.

    features   float32, of which a Frechet distance is made
    clip       cosine of picture and caption
    right      which attributes are as the caption says, 0 or 1; no column where no oracle reads them
    image      PNG, null if left out
    """
    return pa.schema(
        [
            ("id", pa.string()),
            ("source_id", pa.string()),
            ("caption", pa.string()),
            ("w", pa.float32()),
            ("noise_key", pa.int64()),
            ArrayType(shape=(features,), dtype="<f4").field("features"),
            ("clip", pa.float32()),
            *([ArrayType(shape=(attributes,), dtype="|u1").field("right")] if attributes else []),
            pa.field("image", pa.binary(), metadata={"format": "png"}),
        ]
    )


def references_schema(*, features: int) -> pa.Schema:
    """REFERENCES: one row a picture that generated ones are held against: its features, float32."""
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
