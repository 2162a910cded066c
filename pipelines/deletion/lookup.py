"""Looks up which rows of shards a deletion request names by URL or by hash.

The Parquet file beside a tar, or that is a shard, has the URLs and hashes of all its rows, also of those that
were rejected. A shard without one is read whole if hashes are requested; URLs are in the tables as well.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pyarrow as pa

from pipelines.rejections import printable
from pipelines.sources.parquet import CorruptParquetError, RowBatch, open_parquet
from pipelines.sources.settings import ShardSettings
from pipelines.sources.webdataset import Sample, Shard, read_shard
from pipelines.stages.deletion_filter import HASH_COLUMNS, identifiers_of
from pipelines.storage.objects import IO_THREADS
from pipelines.tables.deletion_list import DeletionKeys, Entry

_URL_COLUMNS = ("url", "URL")
_BATCH_ROWS = 4096

_Matches = Iterator[tuple[str, set[Entry]]]
"""The id of each row, and the entries that name it."""


@dataclass(kw_only=True)
class LookupResult:
    """The rows that were found.

    Attributes:
        ids: of the rows, as in LATENTS.
        entries: of the request, those that name a row.
        columns: number of shards whose columns were searched.
        read: number of shards that were read whole.
        skipped: number of shards without such columns that were not read.
    """

    ids: set[str] = field(default_factory=set)
    entries: set[Entry] = field(default_factory=set)
    columns: int = 0
    read: int = 0
    skipped: int = 0


def look_up_shards(shards: Sequence[Shard], keys: DeletionKeys, *, source: str) -> LookupResult:
    """Search all shards.

    Args:
        shards: as from `list_shards`.
        keys: of the request.
        source: the short name of the set of shards, first part of its rows' ids.

    Raises:
        OSError: if the store fails.
    """
    result = LookupResult()
    with ThreadPoolExecutor(IO_THREADS) as readers:
        for found in readers.map(lambda shard: _look_up_shard(shard, keys, source=source), shards):
            result.ids |= found.ids
            result.entries |= found.entries
            result.columns += found.columns
            result.read += found.read
            result.skipped += found.skipped
    return result


def _look_up_shard(shard: Shard, keys: DeletionKeys, *, source: str) -> LookupResult:
    try:
        return _collect(_by_columns(shard, keys), LookupResult(columns=1), source=source)
    except (CorruptParquetError, FileNotFoundError):
        if not keys.hashes:
            return LookupResult(skipped=1)
        return _collect(_by_images(shard, keys), LookupResult(read=1), source=source)


def _collect(matches: _Matches, result: LookupResult, *, source: str) -> LookupResult:
    for id_, entries in matches:
        if entries:
            result.ids.add(f"{source}/{id_}")
            result.entries |= entries
    return result


def _by_columns(shard: Shard, keys: DeletionKeys) -> _Matches:
    """Raises CorruptParquetError if there is no column of keys as text, or none to search."""
    with open_parquet(f"{shard.url.removesuffix('.tar').removesuffix('.parquet')}.parquet") as rows:
        urls = [name for name in _URL_COLUMNS if name in rows.schema.names]
        hashes = [name for name in HASH_COLUMNS if name in rows.schema.names]
        # Keys of another type are not the samples' own: integers have lost their leading zeros.
        has_keys = "key" in rows.schema.names and rows.schema.field("key").type in (
            pa.string(),
            pa.large_string(),
        )
        if not has_keys or not (hashes if keys.hashes else urls):
            raise CorruptParquetError("no column of keys, URLs or hashes")
        names = ["key", *urls, *hashes]
        for batch in rows.batches(names, batch_rows=_BATCH_ROWS):
            if not isinstance(batch, RowBatch):
                continue  # torn rows have no values to compare
            for key, *values in zip(*map(batch.values, names), strict=True):
                row_urls = [url for url in values[: len(urls)] if isinstance(url, str)]
                row_hashes = [value for value in values[len(urls) :] if value is not None]
                yield printable(f"{shard.name}/{key}"), keys.find(urls=row_urls, hashes=row_hashes)


def _by_images(shard: Shard, keys: DeletionKeys) -> _Matches:
    for row in read_shard(shard, ShardSettings()):
        if isinstance(row, Sample):
            yield row.id, keys.find(**identifiers_of(row))
