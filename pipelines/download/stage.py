"""Downloads one shard: a range of a URL list, or the transient failures of an earlier shard."""

import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.download.img2dataset import ShardFetcher
from pipelines.download.receipts import ShardReceipt, publish_shard, published_receipt
from pipelines.download.settings import DownloadSettings
from pipelines.fetching.causes import TRANSIENT, cause_of
from pipelines.rejections import Rejected, Rejection
from pipelines.sources.layouts import clean_metadata
from pipelines.sources.links import Link, LinkList, read_links
from pipelines.stages.row_filter import LinkFilter
from pipelines.stages.select import check
from pipelines.stages.settings import Selection
from pipelines.storage.objects import read_bytes

_REQUIRED: Final = ("url", "caption", "link_id")
# Columns that img2dataset or this stage writes; a list's own columns of these names are dropped.
_MADE: Final = "key status error_message exif md5 sha256 sha512 width height original_width original_height"
_RESERVED: Final = frozenset([*_REQUIRED, *_MADE.split(), "retry_of"])


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """Rows to become one shard: of a list, or of an earlier shard those that failed for a transient cause.

    Attributes:
        number: of the shard, over all lists.
        start: first ordinal of the list; 0 in a round of retries.
        stop: ordinal after the last; the number of rows in a round of retries.
        links: the list; None in a round of retries.
        repeated: ordinals of rows whose URL occurred before in the lists.
        retry: the round of retries; 0 for the first attempt.
    """

    number: int
    start: int
    stop: int
    links: LinkList | None = None
    repeated: tuple[int, ...] = ()
    retry: int = 0

    @property
    def name(self) -> str:
        """Of the shard."""
        return shard_name(self.number, retry=self.retry)

    @property
    def source(self) -> str:
        """The name of the list, or of the shard whose rows are retried."""
        return self.links.name if self.links else shard_name(self.number, retry=self.retry - 1)


def shard_name(number: int, *, retry: int) -> str:
    """The name of a shard in a round of retries; 0 is the first attempt."""
    return f"{number:05d}-r{retry}" if retry else f"{number:05d}"


@dataclass(frozen=True, kw_only=True)
class DownloadShard:
    """A pipeline stage from `ShardTask` to `ShardReceipt`; the shard is published with its receipt."""

    url: str
    settings: DownloadSettings
    selection: Selection
    filters: Sequence[LinkFilter]

    def __call__(self, task: ShardTask) -> ShardReceipt:
        """Make the shard, unless it has its receipt already.

        Raises:
            DownloadError: if img2dataset is not installed.
        """
        if published := published_receipt(self.url, task.name):
            return published
        began = time.monotonic()
        rows, refused = self._rows(task)
        receipt_of = partial(
            ShardReceipt,
            name=task.name,
            number=task.number,
            retry=task.retry,
            source=task.source,
            start=task.start,
            stop=task.stop,
            rows=task.stop - task.start,
            refused=refused,
            settings=self.settings.fetching.to_values(),
        )
        if not rows.num_rows:
            return publish_shard(receipt_of(), {}, url=self.url)
        fetch = ShardFetcher(self.settings.fetching, rows_per_shard=self.settings.rows_per_shard)
        with tempfile.TemporaryDirectory(prefix=f"img2dataset-{task.name}-") as folder:
            shard = fetch(rows, number=task.number, folder=Path(folder))
            receipt = receipt_of(
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
        if task.links is None:
            failed = transient_failures(self.url, task.source)
            # Filtered again, because a deletion request may have come since; selected rows stay selected.
            accepted = [n for n, link in enumerate(_table_to_links(failed)) if self._accepts(link, refused)]
            rows = failed.take(pa.array(accepted, pa.int64()))
        else:
            repeated, links = frozenset(task.repeated), []
            for row in read_links(task.links, self.settings.columns, start=task.start, stop=task.stop):
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
    failed = sidecar.filter(pc.not_equal(sidecar.column("status"), "success"))
    is_transient = [cause_of(message) in TRANSIENT for message in failed.column("error_message").to_pylist()]
    rows = failed.filter(pa.array(is_transient, pa.bool_()))
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
