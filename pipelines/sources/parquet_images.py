"""Reads img2dataset's and Hugging Face's Parquet: image, caption and metadata in columns, failed rows too.

An unreadable row is yielded in its position with its fault, so that ordinals and ids never shift.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.rejections import Rejected
from pipelines.sources.layouts import clean_metadata, image_column, is_bytes, values_of
from pipelines.sources.parquet import CorruptParquetError, ParquetRows, RowBatch, UnreadableRows, open_parquet

_BATCH_ROWS = 8
_KEY_BATCH_ROWS = 4096


@dataclass(frozen=True, kw_only=True)
class ImageRow:
    """One row of a shard, unchecked.

    Attributes:
        ordinal: position in the shard, from 0.
        key: img2dataset's; the ordinal if there is none.
        image: the encoded image; None if there is none or it was not read.
        captions: values that may be the caption, the most trusted first; bytes if they are not UTF-8.
        metadata: the other columns, and the caption if it can be read.
        fault: why the row cannot be used.
    """

    ordinal: int
    key: str
    image: bytes | None = None
    captions: Sequence[object] = ()
    metadata: dict[str, Any] = field(default_factory=dict)
    fault: Rejected | None = None


def has_images(url: str) -> bool:
    """Whether a Parquet file has a column of images; a corrupt file counts as a damaged shard.

    Raises:
        OSError: if the store fails.
    """
    try:
        with open_parquet(url) as rows:
            return image_column(rows.schema) is not None
    except CorruptParquetError:
        return True


def read_image_rows(url: str, *, start: int, max_image_bytes: int) -> Iterator[ImageRow]:
    """Every row in order; of row groups that end before `start` only the keys are read.

    Memory holds 8 rows and one page of each column; img2dataset writes row groups of 100 rows, with the
    images of a row group in one page.

    Raises:
        CorruptParquetError: if the file is not Parquet, or has no column of images.
        OSError: if the store fails.
    """
    with open_parquet(url) as rows:
        image = image_column(rows.schema)
        if image is None:
            raise CorruptParquetError(f"no column of images among {', '.join(rows.schema.names)}")
        others = [
            name for name in rows.schema.names if name != image and not is_bytes(rows.schema.field(name).type)
        ]
        for first, last in rows.spans:
            # Keys are read separately, so that rows with corrupt images keep their ids.
            keys = _keys(rows, first=first, last=last)
            if last <= start:
                yield from (ImageRow(ordinal=first + row, key=key) for row, key in enumerate(keys))
                continue
            for part in rows.batches([*others, image], batch_rows=_BATCH_ROWS, start=first, stop=last):
                batch_keys = keys[part.start - first :]
                if isinstance(part, UnreadableRows):
                    yield from _unreadable_rows(part, batch_keys)
                else:
                    yield from _rows(part, batch_keys, others, image=image, max_image_bytes=max_image_bytes)


def _keys(rows: ParquetRows, *, first: int, last: int) -> list[str]:
    keys = [f"{ordinal:09d}" for ordinal in range(first, last)]
    if "key" not in rows.schema.names:
        return keys
    for part in rows.batches(["key"], batch_rows=_KEY_BATCH_ROWS, start=first, stop=last):
        if isinstance(part, RowBatch):
            for index, key in enumerate(part.values("key"), start=part.start - first):
                keys[index] = key if isinstance(key, str) and key else keys[index]
    return keys


def _unreadable_rows(part: UnreadableRows, keys: list[str]) -> Iterator[ImageRow]:
    for ordinal, key in zip(range(part.start, part.stop), keys, strict=False):
        yield ImageRow(ordinal=ordinal, key=key, fault=part.fault)


def _rows(
    part: RowBatch, keys: list[str], others: list[str], *, image: str, max_image_bytes: int
) -> Iterator[ImageRow]:
    columns = {name: part.values(name) for name in others}
    images = part.record.column(image)
    if pa.types.is_struct(images.type):
        images = pc.struct_field(images, "bytes")
    for row, size in enumerate(pc.binary_length(images).to_pylist()):
        values = {name: column[row] for name, column in columns.items()}
        # The length comes from the offsets, so an oversized image is never copied into Python.
        fits = size is None or size <= max_image_bytes
        detail = f"column {image}: {size} bytes, {max_image_bytes} are allowed"
        yield ImageRow(
            ordinal=part.start + row,
            key=keys[row],
            image=images[row].as_py() if fits else None,
            captions=(values.pop("txt", None), *values_of(values, "caption")),
            metadata=clean_metadata(values),
            fault=None if fits else Rejected("oversized_member", detail),
        )
