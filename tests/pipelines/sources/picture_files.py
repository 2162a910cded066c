"""Parquet shards as img2dataset 1.47 writes them with `output_format=parquet`: columns, types and order."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipelines.sources.shards import ShardRow

_TEXT = pa.string()
_OWN = (
    ("caption", _TEXT),
    ("url", _TEXT),
    ("key", _TEXT),
    ("status", _TEXT),
    ("error_message", _TEXT),
    ("width", pa.int32()),
    ("height", pa.int32()),
    ("original_width", pa.int32()),
    ("original_height", pa.int32()),
    ("exif", _TEXT),
    ("sha256", _TEXT),
)


def write_pictures(
    folder: Path,
    pictures: Sequence[ShardRow],
    *,
    index: int = 0,
    extension: str = "jpg",
    types: Mapping[str, pa.DataType] | None = None,
    rows_per_group: int = 100,
    small_pages: bool = False,
) -> Path:
    """The file of a shard; `types` are those of the additional columns, first as img2dataset puts them."""
    additional = dict.fromkeys(pictures[0].metadata if pictures else {}) | dict(types or {})
    rows = [_row(picture, index=index, position=position) for position, picture in enumerate(pictures)]
    columns = {name: pa.array([row[name] for row in rows], kind) for name, kind in additional.items()}
    columns |= {name: pa.array([row[name] for row in rows], kind) for name, kind in _OWN}
    columns[extension] = pa.array([picture.image for picture in pictures], pa.binary())
    path = folder / f"{index:05d}.parquet"
    # By itself Arrow puts the pictures of a row group into one page.
    pages = {"use_dictionary": False, "write_batch_size": 2} if small_pages else {}
    pq.write_table(pa.table(columns), path, row_group_size=rows_per_group, **pages)
    return path


def _row(picture: ShardRow, *, index: int, position: int) -> dict[str, Any]:
    image = picture.image
    width, height = (None, None) if image is None else _size(image)
    return {
        **picture.metadata,
        "caption": picture.caption,
        "url": picture.url,
        "key": f"{index:05d}{position:04d}",
        "status": picture.status,
        "error_message": picture.error_message,
        "width": width,
        "height": height,
        "original_width": width,
        "original_height": height,
        "exif": None if image is None else "{}",
        "sha256": None if image is None else hashlib.sha256(image).hexdigest(),
    }


def _size(image: bytes) -> tuple[int, int] | tuple[None, None]:
    try:
        with Image.open(io.BytesIO(image)) as header:
            return header.size
    except OSError:
        return None, None
