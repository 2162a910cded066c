"""A range of a URL list to a shard: read, select, fetch, publish. Or a shard's failed rows to another."""

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
from pipelines.download.receipts import ShardReceipt, finish_publishing, publish_shard, read_receipt
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

# What img2dataset gives its own meaning, and what is ours below.
_RESERVED: Final = frozenset(
    [
        *("url", "caption", "key", "status", "error_message", "exif", "md5", "sha256", "sha512"),
        *("width", "height", "original_width", "original_height", "link_id", "retry_of"),
    ]
)
_KEPT: Final = ("url", "caption", "link_id")


@dataclass(frozen=True, kw_only=True)
class DownloadTask:
    """What becomes one shard: ordinals [start, stop) of a list.

    Attributes:
        number: of the shard, over all lists.
        links: the list.
        start: first ordinal.
        stop: ordinal after the last.
        repeated: ordinals of rows whose URL stands further up in the lists.
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

    @property
    def retry(self) -> int:
        """The round of retries: none."""
        return 0


@dataclass(frozen=True, kw_only=True)
class RetryTask:
    """What becomes one shard: the rows of another that failed for a cause that may pass.

    Attributes:
        number: of the shard whose list's rows these are.
        retry: which round of retries this is, from 1; the rows are those that failed in the one before.
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
    """The name of a shard, after that of the first try."""
    return f"{number:05d}-r{retry}" if retry else f"{number:05d}"


class DownloadShard:
    """`ShardTask` in, `ShardReceipt` out; the shard is at `url` when the receipt is."""

    def __init__(
        self,
        *,
        url: str,
        rows_per_shard: int,
        columns: LinkSettings,
        selection: Selection,
        vetoes: Sequence[LinkFilter],
        fetching: FetchSettings,
    ) -> None:
        self.url = url
        self.columns = columns
        self.selection = selection
        self.vetoes = tuple(vetoes)
        self.fetching = fetching
        self.make = ShardFetcher(fetching, rows_per_shard=rows_per_shard)

    def __call__(self, part: ShardTask) -> ShardReceipt:
        """Make the shard, unless it has its receipt already.

        Raises:
            DownloadError: if img2dataset is not installed where it should be.
        """
        if exists(f"{self.url}/_receipts/{part.name}.json"):
            receipt = read_receipt(self.url, part.name)
            finish_publishing(receipt, url=self.url)
            return receipt
        began = time.monotonic()
        rows, refused = self._rows(part)
        source, start, stop = self._origin(part, rows.num_rows + sum(refused.values()))
        told: dict[str, Any] = {
            "name": part.name,
            "number": part.number,
            "retry": part.retry,
            "source": source,
            "start": start,
            "stop": stop,
            "rows": stop - start,
            "refused": refused,
            "settings": self.fetching.to_values(),
        }
        if not rows.num_rows:
            return publish_shard(ShardReceipt(**told), {}, url=self.url)
        with tempfile.TemporaryDirectory(prefix=f"img2dataset-{part.name}-") as folder:
            made = self.make(rows, number=part.number, folder=Path(folder))
            receipt = ShardReceipt(
                **told,
                downloaded=made.downloaded,
                failed=made.failed,
                size=made.files[".tar"].stat().st_size,
                seconds=round(time.monotonic() - began, 2),
                versions=made.versions,
            )
            return publish_shard(receipt, made.files, url=self.url)

    def _rows(self, part: ShardTask) -> tuple[pa.Table, dict[str, int]]:
        """The rows to be asked for, and how many are not, by reason."""
        if isinstance(part, RetryTask):
            return self._again(transient_failures(self.url, part.parent))
        kept: list[Link] = []
        refused: Counter[str] = Counter()
        for row in self._judged(part):
            if isinstance(row, Rejection):
                refused[row.reason] += 1
            else:
                kept.append(row)
        return to_table(kept), dict(sorted(refused.items()))

    def _again(self, rows: pa.Table) -> tuple[pa.Table, dict[str, int]]:
        """Of rows that failed, those that may still be asked for: one may have to be forgotten by now."""
        refused: Counter[str] = Counter()
        kept: list[int] = []
        for place, row in enumerate(rows.to_pylist()):
            url, caption, id_ = (row.pop(name) for name in _KEPT)
            try:
                self._veto(
                    Link(id=id_, ordinal=place, url=url, caption=caption, metadata=clean_metadata(row))
                )
            except Rejected as verdict:
                refused[verdict.reason] += 1
            else:
                kept.append(place)
        return rows.take(pa.array(kept, pa.int64())), dict(sorted(refused.items()))

    def _judged(self, part: DownloadTask) -> Iterator[Link | Rejection]:
        repeated = frozenset(part.repeated)
        for row in read_links(part.links, self.columns, start=part.start, stop=part.stop):
            if isinstance(row, Rejection):
                yield row
                continue
            try:
                if row.ordinal in repeated:
                    raise Rejected("repeated_url")
                check(row.metadata, caption=row.caption, selection=self.selection)
                self._veto(row)
            except Rejected as verdict:
                yield verdict.record(id=row.id, source=part.links.name, ordinal=row.ordinal)
            else:
                yield row

    def _veto(self, row: Link) -> None:
        for veto in self.vetoes:
            veto.check_link(row)

    def _origin(self, part: ShardTask, rows: int) -> tuple[str, int, int]:
        if isinstance(part, RetryTask):
            return part.parent, 0, rows
        return part.links.name, part.start, part.stop


def transient_failures(url: str, shard: str) -> pa.Table:
    """The rows of a shard that failed for a cause that may pass, as img2dataset is to be given them again.

    `retry_of` says which row of which shard each was.

    Raises:
        StorageError: if the shard's sidecar cannot be read.
    """
    sidecar = pq.read_table(pa.BufferReader(read_bytes(f"{url}/{shard}.parquet")))
    told = zip(sidecar.column("status").to_pylist(), sidecar.column("error_message").to_pylist(), strict=True)
    again = [status != "success" and cause_of(message) in TRANSIENT for status, message in told]
    rows = sidecar.filter(pa.array(again, pa.bool_()))
    parents = pa.array([f"{shard}/{key}" for key in rows.column("key").to_pylist()], pa.string())
    kept = [
        name for name in rows.column_names if name not in _RESERVED or name in ("url", "caption", "link_id")
    ]
    return rows.select(kept).append_column("retry_of", parents)


def to_table(links: list[Link]) -> pa.Table:
    """The rows as img2dataset is given them: URL, caption, the link's id, and every column that is not taken.

    img2dataset loses a row whose values JSON does not know, so others become text.
    """
    columns: dict[str, pa.Array] = {
        "url": pa.array([link.url for link in links], pa.string()),
        "caption": pa.array([link.caption for link in links], pa.string()),
        "link_id": pa.array([link.id for link in links], pa.string()),
    }
    for name in dict.fromkeys(name for link in links for name in link.metadata):
        if name not in _RESERVED:
            columns[name] = _column([link.metadata.get(name) for link in links])
    return pa.table(columns)


def _column(values: list[Any]) -> pa.Array:
    try:
        column = pa.array(values)
        json.dumps(column.to_pylist())
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        return pa.array([None if value is None else str(value) for value in values], pa.string())
    return column
