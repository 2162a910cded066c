"""Reads img2dataset shards: a tar of images, captions and metadata with a Parquet sidecar, or Parquet alone.

The caption is the first non-empty one of the .txt, the .json and the sidecar. `tar_samples` resolves other
irregularities of tars.

In Parquet (`output_format=parquet`) rows keep their positions, failed ones included; a corrupt row group
costs its rows from the corruption on.
"""

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.rejections import Rejected, Rejection, printable
from pipelines.sources import SourceError, check_range
from pipelines.sources.file_kinds import PARQUET, kind_of
from pipelines.sources.layouts import text_of
from pipelines.sources.listing import SourceFile, list_files
from pipelines.sources.parquet import CorruptParquetError, open_parquet
from pipelines.sources.parquet_images import ImageRow, has_images, read_image_rows
from pipelines.sources.settings import ShardSettings
from pipelines.sources.sidecar import failure_of, read_sidecar, sidecar_url
from pipelines.sources.tar_samples import OnTear, read_tar, repeated_key
from pipelines.sources.tears import Tear, prefix_digest
from pipelines.sources.text import clean_caption
from pipelines.storage.objects import open_object

_CONCURRENT_FOOTERS = 16
_FOOTER_BYTES = 1 << 16

Shard: TypeAlias = SourceFile
"""One tar, or one Parquet file with a column of images."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image and its caption.

    Attributes:
        id: `<shard name>/<key>`.
        ordinal: position in the shard, from 0.
        key: the members' common name, or the row's key.
        image: the encoded image, not yet decoded.
        caption: one line, not empty.
        metadata: the values of .json and sidecar, under their own names.
        source_id: the image's origin URL if known, else the id; deletion requests refer to it.
    """

    id: str
    ordinal: int
    key: str
    image: bytes
    caption: str
    metadata: dict[str, Any]
    source_id: str


def list_shards(url: str) -> list[Shard]:
    """The shards at `url`, sorted by name: one file, a glob, or a folder.

    A `.parquet` beside a `.tar` of the same name is its sidecar; any other is a shard if its footer has a
    column of images.

    Raises:
        SourceError: if there is none, or `url` cannot be listed.
    """
    files = list_files(url, endings=(".tar", ".parquet"))
    tars = {file.name for file in files if _is_tar(file)}
    candidates = [file for file in files if file.name not in tars]
    try:
        # Each footer is a round trip to the store.
        with ThreadPoolExecutor(_CONCURRENT_FOOTERS) as pool:
            verdicts = pool.map(has_images, [file.url for file in candidates])
            with_images = {file.name for file, verdict in zip(candidates, verdicts, strict=True) if verdict}
    except OSError as error:
        raise SourceError(f"{url} cannot be listed: {error}") from error
    shards = [file for file in files if _is_tar(file) or file.name in with_images]
    if not shards:
        lists = f"; the {len(candidates)} Parquet files there have no images: download URL lists first"
        raise SourceError(
            f"no shards at {url}: give a .tar, a folder of them, a glob such as 'folder/*.tar', or Parquet "
            f"files with a column of images{lists if candidates else ''}"
        )
    return shards


def _is_tar(shard: Shard) -> bool:
    return shard.url.endswith(".tar")


def count_rows(shard: Shard) -> int | None:
    """The rows of a shard by its Parquet file's footer; None without one. An estimate, for progress only."""
    try:
        with open_object(_parquet_url(shard), ahead=_FOOTER_BYTES) as file:
            return int(pq.read_metadata(file).num_rows)
    except (OSError, pa.ArrowException):
        return None


def sidecar_failures(shard: Shard) -> list[Rejected]:
    """Rejections of the rows that only a tar's sidecar lists; the tar is not read. Empty for Parquet."""
    return read_sidecar(_parquet_url(shard))[0].failures() if _is_tar(shard) else []


def metadata_columns(shard: Shard, settings: ShardSettings) -> frozenset[str]:
    """The names of a shard's metadata: the columns of its Parquet file and the keys of its first sample."""
    names: set[str] = set()
    unreadable = contextlib.suppress(CorruptParquetError, FileNotFoundError)
    with unreadable, open_parquet(_parquet_url(shard)) as rows:
        names.update(rows.schema.names)
    first = next((row for row in read_shard(shard, settings) if isinstance(row, Sample)), None)
    return frozenset(names.union(first.metadata if first else ()))


def read_shard(
    shard: Shard,
    settings: ShardSettings,
    *,
    start: int = 0,
    stop: int | None = None,
    on_tear: OnTear | None = None,
) -> Iterator[Sample | Rejection]:
    """Rows `start` <= ordinal < `stop` of a shard, in order, each as a sample or a rejection.

    Ordinals count the samples in the tar and then, in the sidecar's order, its rows that did not arrive:
    failed downloads, and what followed a tear. Without a sidecar they are those that the stats file counts,
    and without both one row stands for everything after a tear. Any other fault of a shard is a tear too.
    Members before `start` are skipped; at most one sample is held in memory. In Parquet, ordinals count all
    rows; row groups before `start` are skipped, and memory holds 8 rows and one page of each column.

    Raises:
        ValueError: if the range is invalid.
        OSError: if the store fails. That is no fault of a row: the unit should be retried.
    """
    check_range(start, stop)
    read = read_tar if _is_tar(shard) else _read_parquet
    for row in read(shard, settings, start=start, on_tear=on_tear):
        if stop is not None and row.ordinal >= stop:
            return
        if row.ordinal >= start:
            yield _check(row, shard, settings)


def _check(row: ImageRow, shard: Shard, settings: ShardSettings) -> Sample | Rejection:
    name = printable(f"{shard.name}/{row.key}")
    try:
        if row.fault is not None:
            raise row.fault
        if row.image is None:
            raise Rejected("missing_image", "a success by the row's account")
        return Sample(
            id=name,
            ordinal=row.ordinal,
            key=printable(row.key),
            image=row.image,
            caption=_first_caption(row.captions, max_chars=settings.max_caption_chars),
            metadata=row.metadata,
            source_id=printable(text_of(row.metadata, "url") or "") or name,
        )
    except Rejected as rejected:
        return rejected.record(id=name, source=shard.name, ordinal=row.ordinal)


def _read_parquet(
    shard: Shard, settings: ShardSettings, *, start: int, on_tear: OnTear | None
) -> Iterator[ImageRow]:
    arrived: set[str] = set()
    try:
        for row in read_image_rows(shard.url, start=start, max_image_bytes=settings.max_image_bytes):
            repeated = repeated_key(row.key) if row.key in arrived else None
            arrived.add(row.key)
            yield replace(row, fault=repeated or row.fault or failure_of(row.metadata))
    except CorruptParquetError as error:
        if on_tear is not None:
            on_tear(Tear(rows=0, bytes=0, sha256=prefix_digest(shard.url, 0)))
        yield ImageRow(ordinal=0, key=".parquet", fault=_unreadable(shard, error))


def _unreadable(shard: Shard, error: CorruptParquetError) -> Rejected:
    with open_object(shard.url, ahead=_FOOTER_BYTES) as file:
        kind = kind_of(file.read(512))
    # A file that begins as Parquet does is torn.
    if kind is None or kind == PARQUET:
        return Rejected("torn_shard", str(error))
    return Rejected("not_a_shard", f"the file is {kind}")


def _parquet_url(shard: Shard) -> str:
    """The sidecar of a tar, or the shard itself."""
    return sidecar_url(shard.url) if _is_tar(shard) else shard.url


def _first_caption(candidates: Sequence[object], *, max_chars: int) -> str:
    rejected = Rejected("missing_caption")
    for candidate in candidates:
        if not isinstance(candidate, str | bytes):
            continue
        try:
            return clean_caption(candidate, max_chars=max_chars)
        except Rejected as fault:
            if fault.reason != "empty_caption":
                raise
            rejected = fault
    raise rejected
