"""Publishes shards atomically and once, each with a receipt that accounts for every requested row.

    shards/00012.tar  .parquet  _stats.json     as img2dataset writes them
    shards/_receipts/00012.json                 where the rows went; written once
    shards/_staging/                            finished shards that are not yet published

No two downloads of a list are equal, so files of two attempts at one shard must not mix. An attempt uploads
its files to the staging folder under a unique name; the receipt, written once, decides whose files are the
shard; then these are moved, the tar last. After a crash in between any other process can finish the move.
"""

import contextlib
import json
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import fsspec

from pipelines.fetching.causes import TRANSIENT
from pipelines.storage.objects import exists, list_names, move_object, put_file, read_bytes, write_once
from snapfusion.records import RecordError, parse_record
from snapfusion.storage import remove_tree

SHARD_SUFFIXES: Final = (".parquet", "_stats.json", ".tar")
"""The files of a shard in the order of publication: a reader that sees the tar can read the others."""


@dataclass(frozen=True, kw_only=True)
class ShardReceipt:
    """Outcome of the rows of one shard: rows = refused + downloaded + failed, always.

    Attributes:
        name: of the shard, `00012`, or `00012-r1` in the first round of retries.
        number: of the shard, 12.
        retry: the round of retries; 0 for the first attempt.
        source: the URL list, or the shard whose failed rows these are.
        start: first ordinal in the source; 0 in a round of retries.
        stop: ordinal after the last; the number of rows in a round of retries.
        rows: their number.
        refused: rows that were not requested, by reason.
        downloaded: rows in the tar.
        failed: rows in the sidecar only, by cause.
        size: bytes of the tar.
        seconds: from the first row to the finished shard.
        settings: of the fetching.
        versions: of the packages that fetched it.
        attempt: the unique name of the attempt whose files were published.
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
        if self.rows != sum(self.refused.values()) + self.requested:
            raise ValueError(
                f"shard {self.name}: {self.rows} rows, but {sum(self.refused.values())} refused, "
                f"{self.downloaded} downloaded and {sum(self.failed.values())} failed"
            )

    @property
    def requested(self) -> int:
        """Rows whose image was requested; if there are none, there is no shard."""
        return self.downloaded + sum(self.failed.values())

    @property
    def transient(self) -> int:
        """Rows that failed for a transient cause."""
        return sum(count for cause, count in self.failed.items() if cause in TRANSIENT)


def publish_shard(receipt: ShardReceipt, files: Mapping[str, Path], *, url: str) -> ShardReceipt:
    """Publish local files as a shard at `url`; returns the receipt that counts.

    If another attempt was first, its shard stands, and this one is discarded.

    Args:
        receipt: of the shard.
        files: local path by suffix, for each of `SHARD_SUFFIXES`; empty if no image was requested.
        url: folder of the shards.

    Raises:
        StorageError: if `url` cannot be written.
    """
    receipt = replace(receipt, attempt=uuid.uuid4().hex)
    for suffix, file in files.items():
        put_file(file, _staged(url, receipt, suffix))
    data = json.dumps(asdict(receipt), indent=2).encode()
    if not write_once(_receipt_url(url, receipt.name), data):
        for suffix in files:
            filesystem, path = fsspec.core.url_to_fs(_staged(url, receipt, suffix))
            with contextlib.suppress(FileNotFoundError):
                filesystem.rm_file(path)
        receipt = _read_receipt(url, receipt.name)
    finish_publishing(receipt, url=url)
    return receipt


def published_receipt(url: str, name: str) -> ShardReceipt | None:
    """The receipt of a shard whose publication is then finished; None if there is no receipt."""
    if not exists(_receipt_url(url, name)):
        return None
    receipt = _read_receipt(url, name)
    finish_publishing(receipt, url=url)
    return receipt


def finish_publishing(receipt: ShardReceipt, *, url: str) -> None:
    """Move the files of a shard from the staging folder to their names, unless that has been done."""
    if not receipt.requested or exists(f"{url}/{receipt.name}.tar"):
        return
    for suffix in SHARD_SUFFIXES:
        move_object(_staged(url, receipt, suffix), f"{url}/{receipt.name}{suffix}")


def read_receipts(url: str) -> dict[str, ShardReceipt]:
    """Every receipt at `url`, by the shard's name."""
    folder = f"{url}/_receipts"
    filesystem, path = fsspec.core.url_to_fs(folder)
    # A name with a leading dot is a file whose writer was killed.
    paths = [f"{path}/{name}" for name in list_names(folder) if not name.startswith(".")]
    # Requests many objects concurrently, as `cat` would, which takes brackets in a name for a pattern.
    contents = filesystem.cat_ranges(paths, None, None, on_error="raise") if paths else ()
    receipts = map(_parse, contents, paths)
    return {receipt.name: receipt for receipt in receipts}


def remove_staging(url: str) -> None:
    """Remove the files of attempts that were killed or came second.

    Only safe when every shard has its receipt, because then no attempt that still runs can win.
    """
    filesystem, path = fsspec.core.url_to_fs(f"{url}/_staging")
    filesystem.invalidate_cache()
    if filesystem.exists(path):
        remove_tree(filesystem, path)


def _receipt_url(url: str, name: str) -> str:
    return f"{url}/_receipts/{name}.json"


def _read_receipt(url: str, name: str) -> ShardReceipt:
    path = _receipt_url(url, name)
    return _parse(read_bytes(path), path)


def _parse(data: bytes, path: str) -> ShardReceipt:
    """A receipt.

    Raises:
        RecordError: if it is damaged, or of another kind.
    """
    try:
        return ShardReceipt(**parse_record(data, name=path))
    except TypeError as error:
        raise RecordError(f"{path} is no receipt of a shard: {error}") from None


def _staged(url: str, receipt: ShardReceipt, suffix: str) -> str:
    return f"{url}/_staging/{receipt.name}-{receipt.attempt}{suffix}"
