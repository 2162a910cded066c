"""Rows of img2dataset's Parquet output: picture, caption and metadata in columns, failed rows among them.

Every row has its place: what cannot be read is told row by row, so that ordinals and ids stay what they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.rejections import Rejected
from pipelines.sources.layouts import clean_metadata, image_column, is_bytes
from pipelines.sources.parquet import CorruptParquetError, ParquetRows, RowBatch, TornRows, open_parquet

_BATCH_ROWS = 8
_KEYS_AT_ONCE = 4096


@dataclass(frozen=True, kw_only=True)
class ImageRow:
    """One row as the file has it.

    Attributes:
        ordinal: position in the file, from 0.
        key: img2dataset's; the ordinal where there is none.
        image: the encoded picture, None where there is none or the row is not wanted.
        txt: the column of that name, as bytes if it is no UTF-8.
        caption: likewise.
        metadata: the other columns, and the caption if it can be read.
        fault: why the row cannot be used.
    """

    ordinal: int
    key: str
    image: bytes | None = None
    txt: str | bytes | None = None
    caption: str | bytes | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    fault: Rejected | None = None


def has_images(url: str) -> bool:
    """Whether a Parquet file is a shard; one that cannot be read is taken for a damaged one.

    Raises:
        OSError: if the store does not answer.
    """
    try:
        with open_parquet(url) as rows:
            return image_column(rows.schema) is not None
    except CorruptParquetError:
        return True


def read_image_rows(url: str, *, start: int, max_image_bytes: int) -> Iterator[ImageRow]:
    """Every row in order; of row groups that end before `start` only the keys are read.

    Memory holds 8 rows and a page of each column. As img2dataset writes pictures, a page holds those of a
    row group, which is of 100 rows.

    Raises:
        CorruptParquetError: if the file is no Parquet, or has no column of pictures.
        OSError: if the store does not answer.
    """
    with open_parquet(url) as rows:
        picture = image_column(rows.schema)
        if picture is None:
            raise CorruptParquetError(f"no column of pictures among {', '.join(rows.schema.names)}")
        others = [name for name in rows.schema.names if not is_bytes(rows.schema.field(name).type)]
        for first, last in rows.spans:
            # Apart from the pictures, so that rows whose pictures are lost keep their names.
            keys = _keys(rows, first=first, last=last)
            if last <= start:
                yield from (ImageRow(ordinal=first + row, key=key) for row, key in enumerate(keys))
                continue
            for part in rows.batches([*others, picture], batch_rows=_BATCH_ROWS, start=first, stop=last):
                here = keys[part.start - first :]
                if isinstance(part, TornRows):
                    yield from _lost(part, here)
                else:
                    yield from _found(part, here, others, picture=picture, max_image_bytes=max_image_bytes)


def _keys(rows: ParquetRows, *, first: int, last: int) -> list[str]:
    keys = [f"{ordinal:09d}" for ordinal in range(first, last)]
    if "key" not in rows.schema.names:
        return keys
    for part in rows.batches(["key"], batch_rows=_KEYS_AT_ONCE, start=first, stop=last):
        if isinstance(part, RowBatch):
            for place, key in enumerate(part.values("key"), start=part.start - first):
                keys[place] = key if isinstance(key, str) and key else keys[place]
    return keys


def _lost(part: TornRows, keys: list[str]) -> Iterator[ImageRow]:
    for ordinal, key in zip(range(part.start, part.stop), keys, strict=False):
        yield ImageRow(ordinal=ordinal, key=key, fault=Rejected("torn_shard", part.detail))


def _found(
    part: RowBatch, keys: list[str], others: list[str], *, picture: str, max_image_bytes: int
) -> Iterator[ImageRow]:
    columns = {name: part.values(name) for name in others}
    pictures = part.record.column(picture)
    sizes = pc.binary_length(pictures).to_pylist()
    for row, size in enumerate(sizes):
        values = {name: column[row] for name, column in columns.items()}
        txt = values.pop("txt", None)
        fits = size is None or size <= max_image_bytes
        yield ImageRow(
            ordinal=part.start + row,
            key=keys[row],
            image=_bytes(pictures, row) if fits else None,
            txt=txt,
            caption=values.get("caption"),
            metadata=clean_metadata(values),
            fault=None if fits else _oversized(picture, size=size, allowed=max_image_bytes),
        )


def _bytes(pictures: pa.Array, row: int) -> bytes | None:
    found: bytes | None = pictures[row].as_py()
    return found


def _oversized(picture: str, *, size: int, allowed: int) -> Rejected:
    return Rejected("oversized_member", f"column {picture}: {size} bytes, {allowed} are allowed")
