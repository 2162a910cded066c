"""Writes shards in img2dataset's layout: `00000.tar`, `00000.parquet`, `00000_stats.json`.

Equal rows give equal bytes: members in the order of the rows, no timestamps, no user names. A shard is built
in memory, and each file appears complete or not at all, the tar last: a reader that sees the tar can rely on
its sidecar.
"""

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
from pipelines.sources.listing import SourceFile
from pipelines.storage.objects import absolute_url, read_bytes, write_once

SIDECAR_FIELDS = pa.schema(
    [
        *((name, pa.string()) for name in ("caption", "url", "key", "status", "error_message")),
        *((name, pa.int32()) for name in ("width", "height", "original_width", "original_height")),
        *((name, pa.string()) for name in ("exif", "sha256")),
    ]
)
"""img2dataset's own columns, in its order."""

_STATUSES = ("success", "failed_to_download", "failed_to_resize")


@dataclass(frozen=True, kw_only=True)
class ShardRow:
    """One row to be written.

    Attributes:
        image: the encoded image; None for a failed row, which only the sidecar then lists.
        caption: None if there is none.
        metadata: additional columns; the same names in every row of a shard.
        url: the image's origin.
        status: img2dataset's: success, failed_to_download or failed_to_resize.
        error_message: of a failed row.
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
            needs = "needs an" if self.image is None else "has no"
            raise ValueError(f"a row of status {self.status} {needs} image")


def write_shard(
    folder: str, rows: Iterable[ShardRow], *, index: int, extension: str = "jpg", rows_per_shard: int = 10_000
) -> SourceFile:
    """Write one shard. An existing shard with the same bytes is left alone.

    Args:
        folder: a local folder or an object-store URL; created if need be.
        rows: at most `rows_per_shard`; all are held in memory.
        index: the shard's number, the first five digits of its keys.
        extension: of the image members, img2dataset's `encode_format`.
        rows_per_shard: determines the number of digits in a key.

    Returns:
        The tar, as `list_shards` gives it.

    Raises:
        ValueError: for more rows than a shard holds.
        SourceError: if another shard of that index exists.
        StorageError: if it cannot be written.
    """
    digits = len(str(rows_per_shard - 1))
    shard = [(row, _values(row, key=f"{index:05d}{n:0{digits}d}")) for n, row in enumerate(rows)]
    if len(shard) > rows_per_shard:
        raise ValueError(f"{len(shard)} rows given, a shard holds {rows_per_shard}")
    stem = f"{absolute_url(folder)}/{index:05d}"
    tar = _tar(shard, extension=extension)
    sidecar = [values for _, values in shard]
    # The tar last: a reader that sees it relies on its sidecar.
    for ending, data in ((".parquet", _sidecar(sidecar)), ("_stats.json", _stats(sidecar)), (".tar", tar)):
        if not write_once(f"{stem}{ending}", data) and read_bytes(f"{stem}{ending}") != data:
            raise SourceError(f"{stem}{ending} exists with other content: remove it, or give another folder")
    return SourceFile(url=f"{stem}.tar", name=f"{index:05d}", size=len(tar))


def _values(row: ShardRow, *, key: str) -> dict[str, Any]:
    width, height = (None, None) if row.image is None else _size(row.image)
    return {
        **row.metadata,
        "caption": row.caption,
        "url": row.url,
        "key": key,
        "status": row.status,
        "error_message": row.error_message,
        "width": width,
        "height": height,
        "original_width": width,
        "original_height": height,
        "exif": None if row.image is None else "{}",
        "sha256": None if row.image is None else hashlib.sha256(row.image).hexdigest(),
    }


def _size(image: bytes) -> tuple[int, int] | tuple[None, None]:
    try:
        with Image.open(io.BytesIO(image)) as header:
            return header.size
    except OSError:
        return None, None


def _tar(shard: list[tuple[ShardRow, dict[str, Any]]], *, extension: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for row, values in shard:
            if row.image is None:
                continue
            members = {extension: row.image, "json": json.dumps(values, indent=4).encode()}
            if row.caption is not None:
                members["txt"] = row.caption.encode()
            for ending, content in members.items():
                header = tarfile.TarInfo(f"{values['key']}.{ending}")
                header.size, header.mode = len(content), 0o444
                archive.addfile(header, io.BytesIO(content))
    return buffer.getvalue()


def _sidecar(rows: list[dict[str, Any]]) -> bytes:
    types = dict(zip(SIDECAR_FIELDS.names, SIDECAR_FIELDS.types, strict=True))
    names = list(rows[0]) if rows else SIDECAR_FIELDS.names
    columns = {name: pa.array([row[name] for row in rows], types.get(name)) for name in names}
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def _stats(rows: list[dict[str, Any]]) -> bytes:
    statuses = Counter(row["status"] for row in rows)
    messages = Counter(row["error_message"] or row["status"] for row in rows)
    stats = {
        "count": len(rows),
        "successes": statuses["success"],
        **{status: statuses[status] for status in _STATUSES[1:]},
        # Real times would make two equal shards differ.
        "duration": 0.0,
        "start_time": 0.0,
        "end_time": 0.0,
        "status_dict": dict(sorted(messages.items())),
    }
    return json.dumps(stats, indent=4).encode()
