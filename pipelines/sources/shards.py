"""Writes shards as img2dataset does: `00000.tar`, `00000.parquet`, `00000_stats.json`.

The same rows give the same bytes: members in the rows' order, no times, no user names. A shard is made in
memory, and each of its files appears at once and whole, the tar last: who sees a tar can read its sidecar.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipelines.sources import SourceError
from pipelines.sources.webdataset import Shard
from pipelines.storage.objects import absolute_url, read_bytes, write_once

_FIELDS = pa.schema(
    [
        ("caption", pa.string()),
        ("url", pa.string()),
        ("key", pa.string()),
        ("status", pa.string()),
        ("error_message", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("original_width", pa.int32()),
        ("original_height", pa.int32()),
        ("exif", pa.string()),
        ("sha256", pa.string()),
    ]
)
_STATUSES = ("success", "failed_to_download", "failed_to_resize")


@dataclass(frozen=True, kw_only=True)
class ShardRow:
    """One row to be written.

    Attributes:
        image: the encoded picture; None for a row that failed, which then is in the sidecar only.
        caption: None where there is none.
        metadata: additional columns; the same names in every row of a shard.
        url: where the picture came from.
        status: as img2dataset spells it.
        error_message: why a row failed.
    """

    image: bytes | None
    caption: str | None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    url: str = ""
    status: str = "success"
    error_message: str | None = None

    def __post_init__(self) -> None:
        if self.status not in _STATUSES:
            raise ValueError(f"status {self.status!r} is not one of {', '.join(_STATUSES)}")
        if (self.image is None) == (self.status == "success"):
            raise ValueError(
                f"a row of status {self.status} {'needs an' if self.image is None else 'has no'} image"
            )


def write_shard(
    folder: str,
    pictures: Iterable[ShardRow],
    *,
    index: int,
    extension: str = "jpg",
    rows_per_shard: int = 10_000,
) -> Shard:
    """Write one shard and say where it lies. A shard that is there already with the same bytes is left alone.

    Args:
        folder: a local folder or an object-store URL; made if need be.
        pictures: at most `rows_per_shard`; all are held in memory.
        index: the shard's number, the first five digits of its keys.
        extension: of the picture members, as img2dataset's `encode_format`.
        rows_per_shard: gives the number of digits in a key.

    Raises:
        ValueError: for more rows than a shard holds.
        SourceError: if the place holds a shard of other content.
        StorageError: if it cannot be written.
    """
    digits = len(str(rows_per_shard - 1))
    rows = [
        _row(picture, key=f"{index:05d}{position:0{digits}d}") for position, picture in enumerate(pictures)
    ]
    if len(rows) > rows_per_shard:
        raise ValueError(f"{len(rows)} rows given, a shard holds {rows_per_shard}")
    stem = f"{absolute_url(folder)}/{index:05d}"
    tar = _tar(rows, extension=extension)
    _put(f"{stem}.parquet", _sidecar([values for _, values in rows]))
    _put(f"{stem}_stats.json", _stats([values for _, values in rows]))
    _put(f"{stem}.tar", tar)
    return Shard(url=f"{stem}.tar", name=f"{index:05d}", size=len(tar))


_Row = tuple[ShardRow, dict[str, Any]]


def _row(picture: ShardRow, *, key: str) -> _Row:
    width, height = (None, None) if picture.image is None else _size(picture.image)
    values = {
        **picture.metadata,
        "caption": picture.caption,
        "url": picture.url,
        "key": key,
        "status": picture.status,
        "error_message": picture.error_message,
        "width": width,
        "height": height,
        "original_width": width,
        "original_height": height,
        "exif": None if picture.image is None else "{}",
        "sha256": None if picture.image is None else hashlib.sha256(picture.image).hexdigest(),
    }
    return picture, values


def _size(image: bytes) -> tuple[int, int] | tuple[None, None]:
    try:
        with Image.open(io.BytesIO(image)) as header:
            return header.size
    except OSError:
        return None, None


def _tar(rows: list[_Row], *, extension: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for picture, values in rows:
            if picture.image is None:
                continue
            members = {extension: picture.image, "json": json.dumps(values, indent=4).encode()}
            if picture.caption is not None:
                members["txt"] = picture.caption.encode()
            for ending, content in members.items():
                header = tarfile.TarInfo(f"{values['key']}.{ending}")
                header.size, header.mode = len(content), 0o444
                archive.addfile(header, io.BytesIO(content))
    return buffer.getvalue()


def _sidecar(rows: list[dict[str, Any]]) -> bytes:
    columns = {name: [row[name] for row in rows] for name in (rows[0] if rows else _FIELDS.names)}
    table = pa.table(
        {
            name: pa.array(values, _FIELDS.field(name).type if name in _FIELDS.names else None)
            for name, values in columns.items()
        }
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def _stats(rows: list[dict[str, Any]]) -> bytes:
    statuses = Counter(row["status"] for row in rows)
    messages = Counter(row["error_message"] or row["status"] for row in rows)
    stats = {
        "count": len(rows),
        "successes": statuses["success"],
        "failed_to_download": statuses["failed_to_download"],
        "failed_to_resize": statuses["failed_to_resize"],
        # Times would make two equal shards differ.
        "duration": 0.0,
        "start_time": 0.0,
        "end_time": 0.0,
        "status_dict": dict(sorted(messages.items())),
    }
    return json.dumps(stats, indent=4).encode()


def _put(url: str, data: bytes) -> None:
    if not write_once(url, data) and read_bytes(url) != data:
        raise SourceError(f"{url} is there with other content: give another folder, or remove that shard")
