"""Which rows of shards a list names by address or by hash: what tables do not know of them.

The Parquet file beside a tar, or that is a shard, has the addresses and hashes of all its rows, of those too
that came to nothing. Without one a shard is read through, if hashes are asked for: tables have addresses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from pipelines.rejections import printable
from pipelines.sources.parquet import CorruptParquetError, RowBatch, open_parquet
from pipelines.sources.settings import ShardSettings
from pipelines.sources.webdataset import Sample, Shard, read_shard
from pipelines.stages.deletion_filter import HASH_COLUMNS, identifiers_of
from pipelines.storage.objects import IO_THREADS
from pipelines.tables.deletion_list import DeletionKeys, Entry

_ADDRESSES = ("url", "URL")
_BATCH_ROWS = 4096


@dataclass(kw_only=True)
class LookupResult:
    """What was found.

    Attributes:
        ids: of the rows, as LATENTS spell them.
        entries: of the list, those that name a row.
        columns: shards whose columns were looked at.
        read: shards that were read through.
        skipped: shards that have no such columns, and were not read.
    """

    ids: set[str] = field(default_factory=set)
    entries: set[Entry] = field(default_factory=set)
    columns: int = 0
    read: int = 0
    skipped: int = 0


def look_up_shards(shards: Sequence[Shard], forgotten: DeletionKeys, *, source: str) -> LookupResult:
    """Look all shards through.

    Args:
        shards: as `list_shards` gives them.
        forgotten: what is asked for.
        source: the short name of the set of shards, first part of its rows' ids.

    Raises:
        OSError: if the store does not answer.
    """
    found = LookupResult()
    with ThreadPoolExecutor(IO_THREADS) as readers:
        for named in readers.map(lambda shard: _look_up_shard(shard, forgotten, source=source), shards):
            found.ids |= named.ids
            found.entries |= named.entries
            found.columns += named.columns
            found.read += named.read
            found.skipped += named.skipped
    return found


def _look_up_shard(shard: Shard, forgotten: DeletionKeys, *, source: str) -> LookupResult:
    try:
        return _collect(_by_columns(shard, forgotten), source=source, columns=1)
    except (CorruptParquetError, FileNotFoundError):
        if not forgotten.hashes:
            return LookupResult(skipped=1)
        return _collect(_by_images(shard, forgotten), source=source, read=1)


def _collect(
    rows: Iterator[tuple[str, set[Entry]]], *, source: str, columns: int = 0, read: int = 0
) -> LookupResult:
    found = LookupResult(columns=columns, read=read)
    for id_, entries in rows:
        if entries:
            found.ids.add(f"{source}/{id_}")
            found.entries |= entries
    return found


def _by_columns(shard: Shard, forgotten: DeletionKeys) -> Iterator[tuple[str, set[Entry]]]:
    """Raises CorruptParquetError if there is no column of keys, or nothing to compare."""
    with open_parquet(f"{shard.url.removesuffix('.tar').removesuffix('.parquet')}.parquet") as rows:
        addresses = [name for name in _ADDRESSES if name in rows.schema.names]
        hashes = [name for name in HASH_COLUMNS if name in rows.schema.names]
        if "key" not in rows.schema.names or not (hashes if forgotten.hashes else addresses):
            raise CorruptParquetError("no column of keys, addresses or hashes")
        for part in rows.batches(["key", *addresses, *hashes], batch_rows=_BATCH_ROWS):
            if isinstance(part, RowBatch):
                yield from _in_batch(part, forgotten, shard=shard, addresses=addresses, hashes=hashes)


def _in_batch(
    part: RowBatch, forgotten: DeletionKeys, *, shard: Shard, addresses: Sequence[str], hashes: Sequence[str]
) -> Iterator[tuple[str, set[Entry]]]:
    columns = {name: part.values(name) for name in ("key", *addresses, *hashes)}
    for place, key in enumerate(columns["key"]):
        urls = [value for name in addresses if isinstance(value := columns[name][place], str)]
        told = [value for name in hashes if (value := columns[name][place]) is not None]
        yield printable(f"{shard.name}/{key}"), forgotten.named_by(urls=urls, hashes=told)


def _by_images(shard: Shard, forgotten: DeletionKeys) -> Iterator[tuple[str, set[Entry]]]:
    for row in read_shard(shard, ShardSettings()):
        if isinstance(row, Sample):
            yield row.id, forgotten.named_by(**identifiers_of(row))
