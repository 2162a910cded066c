"""Shards that appear whole and once, each with a receipt for every row that it was asked to hold.

    shards/00012.tar  .parquet  _stats.json     as img2dataset writes them
    shards/_receipts/00012.json                 where the rows went, written once
    shards/_staging/                            finished shards on their way to their names

No two downloads of a list are the same, so two attempts at one shard must not mix. An attempt puts its files
into the staging folder under a name of its own; then the receipt, written once, says whose files are the
shard; then these are moved, the tar last. Whoever is killed in between leaves what anybody can finish.
"""

from __future__ import annotations

import contextlib
import json
import uuid
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import fsspec

from pipelines.fetching.causes import TRANSIENT
from pipelines.storage.objects import absolute_url, exists, move_object, put_file, read_bytes, write_once

SHARD_SUFFIXES: Final = (".parquet", "_stats.json", ".tar")
"""The files of a shard, in the order in which they appear: who sees the tar can read the others."""


@dataclass(frozen=True, kw_only=True)
class ShardReceipt:
    """Where the rows of one shard went. Rows = refused + downloaded + failed, always.

    Attributes:
        name: of the shard, `00012`, or `00012-r1` in the first round of retries.
        number: of the shard, 12.
        retry: the round of retries; 0 for the first try.
        source: the URL list, or the shard whose failed rows these are.
        start: first ordinal in the source; 0 in a round of retries.
        stop: ordinal after the last; the number of rows in a round of retries.
        rows: how many there were.
        refused: rows that were not asked for, by reason.
        downloaded: rows in the tar.
        failed: rows in the sidecar alone, by cause.
        size: bytes of the tar.
        seconds: from the first row to the finished shard.
        settings: how it was fetched.
        versions: of the packages that fetched it.
        attempt: whose files these are.
    """

    name: str
    number: int
    retry: int
    source: str
    start: int
    stop: int
    rows: int
    refused: Mapping[str, int]
    downloaded: int = 0
    failed: Mapping[str, int] = field(default_factory=dict)
    size: int = 0
    seconds: float = 0.0
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    attempt: str = ""

    def __post_init__(self) -> None:
        if self.rows != sum(self.refused.values()) + self.asked:
            raise ValueError(
                f"shard {self.name}: {self.rows} rows, but {sum(self.refused.values())} refused, "
                f"{self.downloaded} downloaded and {sum(self.failed.values())} failed"
            )

    @property
    def asked(self) -> int:
        """Rows whose picture was asked for; if there is none, there is no shard either."""
        return self.downloaded + sum(self.failed.values())

    @property
    def transient(self) -> int:
        """Rows that failed for a cause that may pass."""
        return sum(count for cause, count in self.failed.items() if cause in TRANSIENT)


def publish_shard(receipt: ShardReceipt, files: Mapping[str, Path], *, url: str) -> ShardReceipt:
    """Make a shard of local files appear at `url`; returns the receipt that counts.

    If another attempt was first, its shard stands, and this one is dropped.

    Args:
        receipt: of the shard.
        files: ending -> place, for each of `SHARD_SUFFIXES`; empty if no picture was asked for.
        url: folder of the shards.

    Raises:
        StorageError: if the place cannot be written.
    """
    receipt = replace(receipt, attempt=uuid.uuid4().hex)
    for ending in files:
        put_file(files[ending], _staged(url, receipt, ending))
    written = json.dumps(asdict(receipt), indent=2).encode()
    if not write_once(_receipt(url, receipt.name), written):
        for ending in files:
            _remove(_staged(url, receipt, ending))
        receipt = read_receipt(url, receipt.name)
    finish_publishing(receipt, url=url)
    return receipt


def finish_publishing(receipt: ShardReceipt, *, url: str) -> None:
    """Move the files of a shard to their names, as far as that has not been done."""
    if not receipt.asked or exists(f"{url}/{receipt.name}.tar"):
        return
    for ending in SHARD_SUFFIXES:
        move_object(_staged(url, receipt, ending), f"{url}/{receipt.name}{ending}")


def read_receipt(url: str, name: str) -> ShardReceipt:
    """The receipt of a shard.

    Raises:
        StorageError: if it cannot be read.
    """
    return ShardReceipt(**json.loads(read_bytes(_receipt(url, name))))


def read_receipts(url: str) -> dict[str, ShardReceipt]:
    """Every receipt at `url`, by the shard's name."""
    filesystem, path = fsspec.core.url_to_fs(f"{absolute_url(url)}/_receipts")
    filesystem.invalidate_cache()
    if not filesystem.exists(path):
        return {}
    # A name that begins with a dot is a file that was being written when its writer was killed.
    places = [
        place
        for place in sorted(filesystem.ls(path, detail=False))
        if not place.rpartition("/")[2].startswith(".")
    ]
    # An object store gives them side by side, and there are many.
    found = (ShardReceipt(**json.loads(data)) for data in filesystem.cat(places).values()) if places else ()
    return {receipt.name: receipt for receipt in found}


def remove_staging(url: str) -> None:
    """Remove what attempts left in the staging folder that were killed or came second.

    Only when every shard has its receipt: whoever still downloads comes second.
    """
    filesystem, path = fsspec.core.url_to_fs(f"{absolute_url(url)}/_staging")
    filesystem.invalidate_cache()
    if filesystem.exists(path):
        filesystem.rm(path, recursive=True)


def sum_counts(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Counts added up, by name."""
    added: Counter[str] = Counter()
    for count in counts:
        added.update(count)
    return dict(sorted(added.items()))


def _receipt(url: str, name: str) -> str:
    return f"{url}/_receipts/{name}.json"


def _staged(url: str, receipt: ShardReceipt, ending: str) -> str:
    return f"{url}/_staging/{receipt.name}-{receipt.attempt}{ending}"


def _remove(url: str) -> None:
    filesystem, path = fsspec.core.url_to_fs(url)
    with contextlib.suppress(FileNotFoundError):
        filesystem.rm_file(path)
