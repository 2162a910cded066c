"""Downloads one shard: a range of a URL list, or the transient failures of an earlier shard."""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.download.img2dataset import ShardFetcher
from pipelines.download.receipts import (
    ShardReceipt,
    finish_publishing,
    publish_shard,
    read_receipt,
    receipt_url,
)
from pipelines.download.settings import FetchSettings
from pipelines.fetching.causes import TRANSIENT, cause_of
from pipelines.rejections import Rejected, Rejection
from pipelines.sources.layouts import clean_metadata
from pipelines.sources.links import Link, LinkList, read_links
from pipelines.sources.settings import LinkSettings
from pipelines.stages.row_filter import LinkFilter
from pipelines.stages.select import check
from pipelines.stages.settings import Selection
from pipelines.storage.objects import exists, read_bytes

_REQUIRED: Final = ("url", "caption", "link_id")
# Columns that img2dataset or this stage writes; a list's own columns of these names are dropped.
_RESERVED: Final = frozenset(
    [
        *(*_REQUIRED, "key", "status", "error_message", "exif", "md5", "sha256", "sha512"),
        *("width", "height", "original_width", "original_height", "retry_of"),
    ]
)


@dataclass(frozen=True, kw_only=True)
class DownloadTask:
    """Ordinals [start, stop) of a list, to become one shard.

    Attributes:
        number: of the shard, over all lists.
        links: the list.
        start: first ordinal.
        stop: ordinal after the last.
        repeated: ordinals of rows whose URL occurred before in the lists.
    """

    number: int
    links: LinkList
    start: int
    stop: int
    repeated: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """Of the shard."""
        return shard_name(self.number, retry=0)


@dataclass(frozen=True, kw_only=True)
class RetryTask:
    """The rows of a shard that failed for a transient cause, to become another shard.

    Attributes:
        number: of the shard of the first attempt.
        retry: the round of retries, from 1; the rows are those that failed in the round before.
    """

    number: int
    retry: int

    @property
    def name(self) -> str:
        """Of the shard."""
        return shard_name(self.number, retry=self.retry)

    @property
    def parent(self) -> str:
        """Of the shard whose rows these are."""
        return shard_name(self.number, retry=self.retry - 1)


ShardTask = DownloadTask | RetryTask


def shard_name(number: int, *, retry: int) -> str:
    """The name of a shard in a round of retries; 0 is the first attempt."""
    return f"{number:05d}-r{retry}" if retry else f"{number:05d}"


class DownloadShard:
    """A pipeline stage from `ShardTask` to `ShardReceipt`; the shard is published with its receipt."""

    def __init__(
        self,
        *,
        url: str,
        rows_per_shard: int,
        columns: LinkSettings,
        selection: Selection,
        filters: Sequence[LinkFilter],
        fetching: FetchSettings,
    ) -> None:
        self.url = url
        self.columns = columns
        self.selection = selection
        self.filters = tuple(filters)
        self.fetching = fetching
        self.fetch = ShardFetcher(fetching, rows_per_shard=rows_per_shard)

    def __call__(self, task: ShardTask) -> ShardReceipt:
        """Make the shard, unless it has its receipt already.

        Raises:
            DownloadError: if img2dataset is not installed.
        """
        if exists(receipt_url(self.url, task.name)):
            receipt = read_receipt(self.url, task.name)
            finish_publishing(receipt, url=self.url)
            return receipt
        began = time.monotonic()
        rows, refused = self._rows(task)
        if isinstance(task, RetryTask):
            source, start, stop = task.parent, 0, rows.num_rows + sum(refused.values())
        else:
            source, start, stop = task.links.name, task.start, task.stop
        entry: dict[str, Any] = {
            "name": task.name,
            "number": task.number,
            "retry": task.retry if isinstance(task, RetryTask) else 0,
            "source": source,
            "start": start,
            "stop": stop,
            "rows": stop - start,
            "refused": refused,
            "settings": self.fetching.to_values(),
        }
        if not rows.num_rows:
            return publish_shard(ShardReceipt(**entry), {}, url=self.url)
        with tempfile.TemporaryDirectory(prefix=f"img2dataset-{task.name}-") as folder:
            shard = self.fetch(rows, number=task.number, folder=Path(folder))
            receipt = ShardReceipt(
                **entry,
                downloaded=shard.downloaded,
                failed=shard.failed,
                size=shard.files[".tar"].stat().st_size,
                seconds=round(time.monotonic() - began, 2),
                versions=shard.versions,
            )
            return publish_shard(receipt, shard.files, url=self.url)

    def _rows(self, task: ShardTask) -> tuple[pa.Table, dict[str, int]]:
        """The rows to request, and the number of refused ones by reason."""
        refused: Counter[str] = Counter()
        if isinstance(task, RetryTask):
            failed = transient_failures(self.url, task.parent)
            # Filtered again, because a deletion request may have come since; selected rows stay selected.
            accepted = [n for n, link in enumerate(_table_to_links(failed)) if self._accepts(link, refused)]
            rows = failed.take(pa.array(accepted, pa.int64()))
        else:
            repeated, links = frozenset(task.repeated), []
            for row in read_links(task.links, self.columns, start=task.start, stop=task.stop):
                if isinstance(row, Rejection):
                    refused[row.reason] += 1
                elif row.ordinal in repeated:
                    refused["repeated_url"] += 1
                elif self._accepts(row, refused, selection=self.selection):
                    links.append(row)
            rows = links_to_table(links)
        return rows, dict(sorted(refused.items()))

    def _accepts(self, link: Link, refused: Counter[str], *, selection: Selection | None = None) -> bool:
        """Whether selection and filters accept a link; a refusal is counted in `refused`."""
        try:
            if selection is not None:
                check(link.metadata, caption=link.caption, selection=selection)
            for row_filter in self.filters:
                row_filter.check_link(link)
        except Rejected as rejected:
            refused[rejected.reason] += 1
            return False
        return True


def transient_failures(url: str, shard: str) -> pa.Table:
    """The rows of a shard that failed for a transient cause, as input of img2dataset.

    `retry_of` identifies each row by shard and key.

    Raises:
        StorageError: if the shard's sidecar cannot be read.
    """
    sidecar = pq.read_table(pa.BufferReader(read_bytes(f"{url}/{shard}.parquet")))
    outcomes = zip(
        sidecar.column("status").to_pylist(), sidecar.column("error_message").to_pylist(), strict=True
    )
    is_transient = [status != "success" and cause_of(message) in TRANSIENT for status, message in outcomes]
    rows = sidecar.filter(pa.array(is_transient, pa.bool_()))
    parents = pa.array([f"{shard}/{key}" for key in rows.column("key").to_pylist()], pa.string())
    columns = [name for name in rows.column_names if name in _REQUIRED or name not in _RESERVED]
    return rows.select(columns).append_column("retry_of", parents)


def _table_to_links(rows: pa.Table) -> Iterator[Link]:
    for ordinal, row in enumerate(rows.to_pylist()):
        url, caption, id_ = (row.pop(name) for name in _REQUIRED)
        yield Link(id=id_, ordinal=ordinal, url=url, caption=caption, metadata=clean_metadata(row))


def links_to_table(links: list[Link]) -> pa.Table:
    """The rows as input of img2dataset: URL, caption, the link's id, and all columns that are not reserved.

    img2dataset drops rows with values that JSON cannot hold, so such columns are converted to text.
    """
    columns: dict[str, pa.Array] = {
        "url": pa.array([link.url for link in links], pa.string()),
        "caption": pa.array([link.caption for link in links], pa.string()),
        "link_id": pa.array([link.id for link in links], pa.string()),
    }
    for name in dict.fromkeys(name for link in links for name in link.metadata):
        if name not in _RESERVED:
            columns[name] = _json_column([link.metadata.get(name) for link in links])
    return pa.table(columns)


def _json_column(values: list[Any]) -> pa.Array:
    try:
        column = pa.array(values)
        json.dumps(column.to_pylist())
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        return pa.array([None if value is None else str(value) for value in values], pa.string())
    return column
