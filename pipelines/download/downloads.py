"""Downloads URL lists into shards: each list is divided into ranges, and transient failures are retried.

URL lists ─ ranges of rows, repeated URLs ─ select, fetch ─ shard and receipt ─ retries ─ shards

One range becomes one shard. The plan and the receipts are stored beside the shards, so an interrupted run
continues where it was, and a complete one does nothing.
"""

import io
import json
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.download.receipts import ShardReceipt, finish_publishing, read_receipts, remove_staging
from pipelines.download.repeated_urls import find_repeated_urls
from pipelines.download.settings import RESIZING, DownloadSettings
from pipelines.download.stage import DownloadShard, ShardTask, shard_name
from pipelines.fetching.causes import TRANSIENT
from pipelines.ray_data.execution import PipelineStage, Runner, run_on_ray
from pipelines.sources import SourceError
from pipelines.sources.links import LinkList, list_links, read_header
from pipelines.sources.listing import list_files
from pipelines.sources.parquet import RowBatch, open_parquet
from pipelines.sources.settings import LinkSettings
from pipelines.stages.row_filter import LinkFilter, describe_filters
from pipelines.stages.settings import Selection
from pipelines.storage.objects import absolute_url, exists, read_bytes, replace_object, write_once
from pipelines.storage.records import read_record
from pipelines.tables.committer import CommitProgress, OnProgress
from snapfusion.settings import differences

_BATCH_ROWS = 1024


class TooManyFailedError(RuntimeError):
    """More rows failed than the bound allows: more likely a fault of the network than of the rows."""


_IN_IDENTITY = (*RESIZING, "user_agent_token", "respected")
"""The settings of `FetchSettings` that determine shards; the others bound time and resources."""


@dataclass(frozen=True, kw_only=True)
class ShardRanges:
    """The ranges of URL lists that become shards.

    Attributes:
        lists: of links, in order.
        rows: of each list.
        rows_per_shard: a list's last shard may have fewer.
    """

    lists: Sequence[LinkList]
    rows: Sequence[int]
    rows_per_shard: int

    @property
    def total(self) -> int:
        """Rows of all lists."""
        return sum(self.rows)

    def tasks(self, repeated: Mapping[int, tuple[int, ...]]) -> Iterator[ShardTask]:
        """The ranges, numbered over all lists; `repeated` are the ordinals of repeated rows by number."""
        number = 0
        for links, rows in zip(self.lists, self.rows, strict=True):
            for start in range(0, rows, self.rows_per_shard):
                stop = min(start + self.rows_per_shard, rows)
                yield ShardTask(
                    number=number, links=links, start=start, stop=stop, repeated=repeated.get(number, ())
                )
                number += 1


def find_ranges(settings: DownloadSettings) -> ShardRanges:
    """The ranges, by the footers of the lists.

    Raises:
        SourceError: if there are no lists, or one is unreadable.
    """
    if settings.links is None:
        raise SourceError("download.links is not set: give a .parquet of URLs and captions, a folder or glob")
    lists = list_links(settings.links)
    rows = [read_header(links, settings.columns).rows for links in lists]
    return ShardRanges(lists=lists, rows=rows, rows_per_shard=settings.rows_per_shard)


def download_identity(
    ranges: ShardRanges, settings: DownloadSettings, *, selection: Selection, filters: Sequence[LinkFilter]
) -> dict[str, Any]:
    """Everything that determines which rows become which shard, apart from the servers' responses."""
    fetching = settings.fetching.to_values()
    lists = zip(ranges.lists, ranges.rows, strict=True)
    return {
        "lists": {links.name: {"size": links.size, "rows": rows} for links, rows in lists},
        "rows_per_shard": settings.rows_per_shard,
        "columns": settings.columns.to_values(),
        "selection": selection.to_values(),
        **{name: fetching[name] for name in _IN_IDENTITY},
        **describe_filters(filters),
    }


@dataclass(frozen=True, kw_only=True)
class DownloadSummary:
    """Totals over all rows. rows = refused + downloaded + failed, where every shard has its receipt.

    Attributes:
        complete: whether every range has become a shard.
        rows: of the lists, as far as they were read.
        refused: rows that were not requested, by reason.
        downloaded: rows in tars.
        failed: rows that failed in the last round that requested them, by cause.
        shards: their number, those of retries included.
        size: bytes of their tars.
        retried: rows of each round of retries, and how many of them were downloaded.
        identity: the values that determine the shards.
    """

    complete: bool
    rows: int
    refused: dict[str, int]
    downloaded: int
    failed: dict[str, int]
    shards: int
    size: int
    retried: list[dict[str, int]]
    identity: dict[str, Any]

    @property
    def transient(self) -> int:
        """Rows that another round might download."""
        return sum(count for cause, count in self.failed.items() if cause in TRANSIENT)


def download_shards(
    settings: DownloadSettings,
    *,
    selection: Selection,
    url: str,
    filters: Sequence[LinkFilter] = (),
    run: Runner = run_on_ray,
    on_progress: OnProgress | None = None,
) -> DownloadSummary:
    """Download the shards at `url` that are missing; returns the totals over all rows.

    Args:
        settings: of the download.
        selection: filter of the requested rows.
        url: folder of the shards; nothing else may lie there.
        filters: refuse rows in addition to the selection.
        run: sends tasks through the stage.
        on_progress: called after each shard.

    Raises:
        SourceError: if there are no lists, or the shards at `url` have another identity.
        StorageError: if `url` cannot be read or written.
        TooManyFailedError: when the fraction of failed rows is above its bound.
    """
    url = absolute_url(url)
    ranges = find_ranges(settings)
    identity = download_identity(ranges, settings, selection=selection, filters=filters)
    _check_identity(url, identity)
    receipts = read_receipts(url)
    for receipt in receipts.values():
        finish_publishing(receipt, url=url)
    arguments = {"url": url, "settings": settings, "selection": selection, "filters": tuple(filters)}
    stage = PipelineStage(build=DownloadShard, arguments=arguments, pool=settings.pool)

    def download(tasks: Sequence[ShardTask]) -> Iterator[ShardReceipt]:
        progress = CommitProgress(total=sum(task.stop - task.start for task in tasks))
        for receipt in run(tasks, [stage]):
            receipts[receipt.name] = receipt
            progress = progress.advanced(rows=receipt.rows, rejected=receipt.rows - receipt.downloaded)
            if on_progress:
                on_progress(progress)
            yield receipt

    repeated = _repeated_rows(url, ranges, settings.columns)
    new: list[ShardReceipt] = []
    for receipt in download([task for task in ranges.tasks(repeated) if task.name not in receipts]):
        new.append(receipt)
        _check_failures(new, settings, url=url)
    for retry in range(1, settings.retry_rounds + 1):
        retries = [
            ShardTask(number=receipt.number, start=0, stop=receipt.transient, retry=retry)
            for receipt in receipts.values()
            if receipt.retry == retry - 1 and receipt.transient
        ]
        deque(download([task for task in retries if task.name not in receipts]), maxlen=0)
    summary = summarise(receipts, ranges=ranges, identity=identity)
    replace_object(f"{url}/_receipt.json", json.dumps(asdict(summary), indent=2).encode())
    remove_staging(url)
    return summary


def summarise(
    receipts: Mapping[str, ShardReceipt], *, ranges: ShardRanges, identity: dict[str, Any]
) -> DownloadSummary:
    """The totals of the receipts. A row that was retried counts in its last round."""
    failed = [
        {
            cause: count
            for cause, count in receipt.failed.items()
            if cause not in TRANSIENT or shard_name(receipt.number, retry=receipt.retry + 1) not in receipts
        }
        for receipt in receipts.values()
    ]
    rounds: dict[int, list[ShardReceipt]] = defaultdict(list)
    for receipt in receipts.values():
        rounds[receipt.retry].append(receipt)
    return DownloadSummary(
        complete=len(rounds[0]) == sum(1 for _ in ranges.tasks({})),
        rows=sum(receipt.rows for receipt in rounds[0]),
        refused=_sum_counts(receipt.refused for receipt in receipts.values()),
        downloaded=sum(receipt.downloaded for receipt in receipts.values()),
        failed=_sum_counts(failed),
        shards=sum(bool(receipt.requested) for receipt in receipts.values()),
        size=sum(receipt.size for receipt in receipts.values()),
        retried=[
            {"rows": sum(one.rows for one in group), "downloaded": sum(one.downloaded for one in group)}
            for retry, group in sorted(rounds.items())
            if retry
        ],
        identity=identity,
    )


def _sum_counts(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    return dict(sorted(sum(map(Counter, counts), Counter()).items()))


def _check_failures(receipts: Sequence[ShardReceipt], settings: DownloadSettings, *, url: str) -> None:
    """Hold this run's shards to the bound on failed rows."""
    requested = sum(receipt.requested for receipt in receipts)
    failed = requested - sum(receipt.downloaded for receipt in receipts)
    if requested >= settings.judged_after and failed > settings.max_failed * requested:
        causes = _sum_counts(receipt.failed for receipt in receipts)
        counted = ", ".join(f"{count} {cause}" for cause, count in causes.items())
        raise TooManyFailedError(
            f"{failed} of {requested} rows failed ({counted}), more than the bound of "
            f"{settings.max_failed:.0%}; see {url}/_receipts, then repair the network or raise "
            "download.max_failed. download.retry_rounds retries transient causes"
        )


def _check_identity(url: str, identity: dict[str, Any]) -> None:
    """Record the identity of the shards at `url`, or compare it with the recorded one.

    Raises:
        SourceError: if it is another.
    """
    plan = f"{url}/_plan.json"
    if not exists(plan) and exists(url) and list_files(url, endings=(".tar",)):
        raise SourceError(f"{url} holds shards of another origin; give another download.folder")
    written = json.dumps(identity, indent=2).encode()
    write_once(plan, written)
    if differing := list(differences(read_record(plan), json.loads(written))):
        raise SourceError(
            f"the shards at {url} were downloaded otherwise: {'; '.join(differing[:3])}; "
            "give another download.folder"
        )


def _repeated_rows(url: str, ranges: ShardRanges, columns: LinkSettings) -> dict[int, tuple[int, ...]]:
    """The ordinals of rows with a repeated URL, by the number of their range; computed once and stored."""
    stored = f"{url}/_repeated.parquet"
    if not exists(stored):
        buffer = io.BytesIO()
        rows = find_repeated_urls(_urls(ranges, columns))
        pq.write_table(pa.table({"row": pa.array(rows, pa.int64())}), buffer, compression="zstd")
        write_once(stored, buffer.getvalue())
    rows = pq.read_table(pa.BufferReader(read_bytes(stored))).column("row").to_numpy()
    repeated: dict[int, tuple[int, ...]] = {}
    before = 0
    for task in ranges.tasks({}):
        low, high = np.searchsorted(rows, [before, before + task.stop - task.start])
        if high > low:
            repeated[task.number] = tuple((rows[low:high] - before + task.start).tolist())
        before += task.stop - task.start
    return repeated


def _urls(ranges: ShardRanges, columns: LinkSettings) -> Iterator[str | bytes | None]:
    """The URL of every row of every list; None where it cannot be read."""
    for links in ranges.lists:
        name = read_header(links, columns).url_column
        with open_parquet(links.url) as rows:
            for part in rows.batches([name], batch_rows=_BATCH_ROWS):
                if isinstance(part, RowBatch):
                    yield from part.values(name)
                else:
                    yield from [None] * (part.stop - part.start)
