"""The columns of each kind of table, and the bytes behind its binary columns.

Arrays are stored as `binary` in C order, little-endian; the field's metadata states shape and dtype, and
every value's length is checked when it is packed and when it is read.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from PIL import Image

SCHEMA_VERSION = 1

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


@dataclass(frozen=True, kw_only=True)
class Array:
    """The shape and dtype of a binary column's values."""

    shape: tuple[int, ...]
    dtype: str

    def field(self, name: str) -> pa.Field:
        """The Arrow field, its metadata stating shape and dtype."""
        shape = ",".join(map(str, self.shape))
        return pa.field(name, pa.binary(), metadata={"shape": shape, "dtype": self.dtype})

    def pack(self, values: np.ndarray) -> list[bytes]:
        """One value a row of `values` [B, *shape].

        Raises:
            ValueError: if the shape differs.
        """
        if len(values) == 0:
            return []
        if values.shape[1:] != self.shape:
            raise ValueError(f"values of shape {values.shape[1:]} given, {self.shape} is accepted")
        return [row.tobytes() for row in np.ascontiguousarray(values, dtype=self.dtype)]

    def unpack(self, values: Sequence[bytes]) -> np.ndarray:
        """The values as one array [B, *shape].

        Raises:
            ValueError: if a value's length differs.
        """
        expected = int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize
        for row, value in enumerate(values):
            if len(value) != expected:
                raise ValueError(
                    f"row {row} has {len(value)} bytes, {self.dtype} {self.shape} has {expected}"
                )
        return np.frombuffer(b"".join(values), dtype=self.dtype).reshape(len(values), *self.shape)


def array_of(field: pa.Field) -> Array:
    """What a binary field's metadata states.

    Raises:
        ValueError: if the field states nothing.
    """
    stated = field.metadata or {}
    if b"shape" not in stated or b"dtype" not in stated:
        raise ValueError(f"column {field.name!r} states no shape and dtype")
    shape = tuple(int(side) for side in stated[b"shape"].decode().split(","))
    return Array(shape=shape, dtype=stated[b"dtype"].decode())


def latents_schema(*, latent_shape: Sequence[int], num_tokens: int) -> pa.Schema:
    """LATENTS: one row an image. `latent` is the posterior mean times the scaling factor."""
    return pa.schema(
        [
            ("id", pa.string()),
            ("source_id", pa.string()),
            ("caption", pa.string()),
            Array(shape=(num_tokens,), dtype="<i4").field("token_ids"),
            Array(shape=tuple(latent_shape), dtype="<f2").field("latent"),
        ]
    )


def pairs_schema(*, latent_shape: Sequence[int], num_tokens: int) -> pa.Schema:
    """PAIRS: one row a (caption, draw); `image` is the teacher's decode as PNG, null if left out."""
    return pa.schema(
        [
            ("id", pa.string()),
            ("source_id", pa.string()),
            ("caption", pa.string()),
            Array(shape=(num_tokens,), dtype="<i4").field("token_ids"),
            ("noise_key", pa.int64()),
            ("draw", pa.int32()),
            Array(shape=tuple(latent_shape), dtype="<f2").field("latent"),
            pa.field("image", pa.binary(), metadata={"format": "png"}),
        ]
    )


def targets_schema(*, latent_shape: Sequence[int], num_tokens: int, x_dtype: str) -> pa.Schema:
    """TARGETS: one row a (latent, draw); `w` is null in vanilla rows. SnapFusion Eq. 7-10.

    noise_key, interval, t, t2, k, w   what was drawn: the noise is `snapfusion.noise.gaussian` of the key;
                                       interval and w follow from it too (`snapfusion.training.draws`)
    x_target                           the x that lands one student step from t to t2 on the teacher's k
    """
    shape = tuple(latent_shape)
    return pa.schema(
        [
            ("id", pa.string()),
            ("source_id", pa.string()),
            ("draw", pa.int32()),
            Array(shape=(num_tokens,), dtype="<i4").field("token_ids"),
            Array(shape=shape, dtype="<f2").field("latent"),
            ("noise_key", pa.int64()),
            ("interval", pa.int32()),
            ("t", pa.int32()),
            ("t2", pa.int32()),
            ("k", pa.int32()),
            ("w", pa.float32()),
            Array(shape=shape, dtype={"float16": "<f2", "float32": "<f4"}[x_dtype]).field("x_target"),
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
            Array(shape=(features,), dtype="<f4").field("features"),
            ("clip", pa.float32()),
            *([Array(shape=(attributes,), dtype="|u1").field("right")] if attributes else []),
            pa.field("image", pa.binary(), metadata={"format": "png"}),
        ]
    )


def references_schema(*, features: int) -> pa.Schema:
    """REFERENCES: one row a picture that generated ones are held against: its features, float32."""
    return pa.schema([("id", pa.string()), Array(shape=(features,), dtype="<f4").field("features")])


def to_png(image: np.ndarray) -> bytes:
    """A uint8 image [H,W,3] as PNG: lossless, and the same bytes for the same pixels."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", compress_level=3)
    return buffer.getvalue()


def from_png(data: bytes) -> np.ndarray:
    """A PNG as uint8 [H,W,3]."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))
