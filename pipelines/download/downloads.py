"""URL lists become shards: planned once, downloaded range by range, what failed tried again in rounds.

URL lists ─ plan: ranges of rows, repeated URLs ─ select, fetch ─ shard and receipt ─ retries ─ shards

A range is one shard. The plan and the receipts lie beside the shards, so a run that was ended anywhere goes
on where it was, and one that is complete does nothing.
"""

from __future__ import annotations

import io
import json
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.download.receipts import (
    ShardReceipt,
    finish_publishing,
    read_receipts,
    remove_staging,
    sum_counts,
)
from pipelines.download.repeated_urls import find_repeated_urls
from pipelines.download.settings import DownloadSettings
from pipelines.download.stage import DownloadShard, DownloadTask, RetryTask, ShardTask
from pipelines.fetching.causes import TRANSIENT
from pipelines.ray_data.execution import PipelineStage, Runner, run_on_ray
from pipelines.sources import SourceError
from pipelines.sources.links import LinkList, list_links, read_header
from pipelines.sources.listing import list_files
from pipelines.sources.parquet import RowBatch, open_parquet
from pipelines.sources.settings import LinkSettings
from pipelines.stages.row_filter import LinkFilter
from pipelines.stages.settings import Selection
from pipelines.storage.objects import absolute_url, exists, read_bytes, replace_object, write_once
from pipelines.tables.committer import CommitProgress, OnProgress
from snapfusion.settings import differences

_BATCH_ROWS = 1024


class TooManyFailedError(RuntimeError):
    """More rows failed than the bound allows: the network is more likely at fault than the rows."""


_IN_IDENTITY = (
    "image_size",
    "resize_mode",
    "resize_only_if_bigger",
    "encode_quality",
    "user_agent_token",
    "respected",
)
"""The settings of `Fetching` that determine shards; the others say from where and with how much patience."""


@dataclass(frozen=True, kw_only=True)
class ShardRanges:
    """Which ranges of which lists become shards.

    Attributes:
        lists: of links, in order.
        rows: of each.
        rows_per_shard: a list's last shard may have fewer.
    """

    lists: Sequence[LinkList]
    rows: Sequence[int]
    rows_per_shard: int

    @property
    def total(self) -> int:
        """Rows of all lists."""
        return sum(self.rows)

    def parts(self, repeated: Mapping[int, tuple[int, ...]]) -> Iterator[DownloadTask]:
        """The ranges, numbered over all lists; `repeated` are the ordinals of repeated rows by number."""
        number = 0
        for links, rows in zip(self.lists, self.rows, strict=True):
            for start in range(0, rows, self.rows_per_shard):
                stop = min(start + self.rows_per_shard, rows)
                yield DownloadTask(
                    number=number, links=links, start=start, stop=stop, repeated=repeated.get(number, ())
                )
                number += 1


def find_ranges(settings: DownloadSettings) -> ShardRanges:
    """The ranges, by the lists' footers.

    Raises:
        SourceError: if there are no lists, or one is not readable.
    """
    if settings.links is None:
        raise SourceError(
            "download.links is not set: give a .parquet of URLs and captions, a folder or a glob"
        )
    lists = list_links(settings.links)
    rows = [read_header(links, settings.columns).rows for links in lists]
    return ShardRanges(lists=lists, rows=rows, rows_per_shard=settings.rows_per_shard)


def download_identity(
    planned: ShardRanges,
    settings: DownloadSettings,
    *,
    selection: Selection,
    vetoes: Sequence[LinkFilter] = (),
) -> dict[str, Any]:
    """Everything that determines which rows become which shard; the web's answers apart."""
    fetching = settings.fetching.to_values()
    told = {name: value for veto in vetoes for name, value in veto.describe().items()}
    lists = zip(planned.lists, planned.rows, strict=True)
    return {
        "lists": {links.name: {"size": links.size, "rows": rows} for links, rows in lists},
        "rows_per_shard": settings.rows_per_shard,
        "columns": settings.columns.to_values(),
        "selection": selection.to_values(),
        **{name: fetching[name] for name in _IN_IDENTITY},
        **told,
    }


@dataclass(frozen=True, kw_only=True)
class DownloadSummary:
    """What became of all rows. Rows = refused + downloaded + failed, where every shard has its receipt.

    Attributes:
        complete: whether every range has become a shard.
        rows: of the lists, as far as they were read.
        refused: rows that were not asked for, by reason.
        downloaded: rows in tars.
        failed: rows that were not had in the last round that asked for them, by cause.
        shards: how many, those of retries included.
        size: bytes of their tars.
        retried: rows of each round of retries, and how many of them were had.
        identity: what determines the shards.
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
        """Rows that another round might still have."""
        return sum(count for cause, count in self.failed.items() if cause in TRANSIENT)


def download_shards(
    settings: DownloadSettings,
    *,
    selection: Selection,
    url: str,
    vetoes: Sequence[LinkFilter] = (),
    run: Runner = run_on_ray,
    on_progress: OnProgress | None = None,
) -> DownloadSummary:
    """Bring the shards at `url` to hold what the lists' rows lead to; returns what became of the rows.

    Args:
        settings: how.
        selection: which rows are asked for at all.
        url: folder of the shards; nothing else may lie there.
        vetoes: what refuses rows beside the selection.
        run: what sends ranges through the stage.
        on_progress: called after each shard.

    Raises:
        SourceError: if there are no lists, or the shards at `url` were planned otherwise.
        StorageError: if the place cannot be read or written.
        TooManyFailed: when the fraction of rows that failed is above its bound.
    """
    url = absolute_url(url)
    planned = find_ranges(settings)
    identity = download_identity(planned, settings, selection=selection, vetoes=vetoes)
    _settle_plan(url, identity)
    known = read_receipts(url)
    for receipt in known.values():
        finish_publishing(receipt, url=url)
    stage = PipelineStage(
        build=DownloadShard,
        arguments={
            "url": url,
            "rows_per_shard": settings.rows_per_shard,
            "columns": settings.columns,
            "selection": selection,
            "vetoes": tuple(vetoes),
            "fetching": settings.fetching,
        },
        pool=settings.pool,
    )
    parts: list[ShardTask] = [
        part for part in planned.parts(_repeated(url, planned, settings.columns)) if part.name not in known
    ]
    waiting = sum(_rows_of(part, known) for part in parts)
    fresh: list[ShardReceipt] = []
    for receipt in _take_in(run(parts, [stage]), known, total=waiting, tell=on_progress):
        fresh.append(receipt)
        _judge(fresh, settings, url=url)
    for retry in range(1, settings.retry_rounds + 1):
        parts = [
            part
            for receipt in list(known.values())
            if receipt.retry == retry - 1 and receipt.transient
            if (part := RetryTask(number=receipt.number, retry=retry)).name not in known
        ]
        waiting = sum(_rows_of(part, known) for part in parts)
        deque(_take_in(run(parts, [stage]), known, total=waiting, tell=on_progress), maxlen=0)
    summary = summarise(known, planned=planned, identity=identity)
    replace_object(f"{url}/_receipt.json", json.dumps(asdict(summary), indent=2).encode())
    remove_staging(url)
    return summary


def summarise(
    known: Mapping[str, ShardReceipt], *, planned: ShardRanges, identity: dict[str, Any]
) -> DownloadSummary:
    """What the receipts say together. A row that was tried again counts where it was tried last."""
    first = [receipt for receipt in known.values() if not receipt.retry]
    again = {(receipt.number, receipt.retry) for receipt in known.values() if receipt.retry}
    failed = [
        {
            cause: count
            for cause, count in receipt.failed.items()
            if cause not in TRANSIENT or (receipt.number, receipt.retry + 1) not in again
        }
        for receipt in known.values()
    ]
    rounds = groupby(sorted(known.values(), key=lambda receipt: receipt.retry), key=lambda r: r.retry)
    retried = [
        {"rows": sum(r.rows for r in group), "downloaded": sum(r.downloaded for r in group)}
        for retry, group in ((retry, list(group)) for retry, group in rounds)
        if retry
    ]
    return DownloadSummary(
        complete=len(first) == sum(1 for _ in planned.parts({})),
        rows=sum(receipt.rows for receipt in first),
        refused=sum_counts(receipt.refused for receipt in known.values()),
        downloaded=sum(receipt.downloaded for receipt in known.values()),
        failed=sum_counts(failed),
        shards=sum(bool(receipt.asked) for receipt in known.values()),
        size=sum(receipt.size for receipt in known.values()),
        retried=retried,
        identity=identity,
    )


def _take_in(
    finished: Iterator[ShardReceipt], known: dict[str, ShardReceipt], *, total: int, tell: OnProgress | None
) -> Iterator[ShardReceipt]:
    """The receipts as they arrive, put to those that are known."""
    progress = CommitProgress(rows=0, total=total, rejected=0, units=0, first_rows=0, steady_seconds=0.0)
    first = time.monotonic()
    for receipt in finished:
        known[receipt.name] = receipt
        now = time.monotonic()
        first = first if progress.units else now
        progress = CommitProgress(
            rows=progress.rows + receipt.rows,
            total=total,
            rejected=progress.rejected + receipt.rows - receipt.downloaded,
            units=progress.units + 1,
            first_rows=progress.first_rows if progress.units else receipt.rows,
            steady_seconds=now - first,
        )
        if tell:
            tell(progress)
        yield receipt


def _judge(fresh: Sequence[ShardReceipt], settings: DownloadSettings, *, url: str) -> None:
    """Hold what this run had so far to the bound."""
    asked = sum(receipt.asked for receipt in fresh)
    failed = sum(receipt.asked - receipt.downloaded for receipt in fresh)
    if asked >= settings.judged_after and failed > settings.max_failed * asked:
        causes = ", ".join(f"{count} {cause}" for cause, count in sum_counts(r.failed for r in fresh).items())
        raise TooManyFailedError(
            f"{failed} of {asked} rows failed ({causes}), more than the bound of {settings.max_failed:.0%}; "
            f"look at {url}/_receipts, then mend the network, or raise download.max_failed. What may pass is "
            "tried again by download.retry_rounds"
        )


def _rows_of(part: ShardTask, known: Mapping[str, ShardReceipt]) -> int:
    return known[part.parent].transient if isinstance(part, RetryTask) else part.stop - part.start


def _settle_plan(url: str, identity: dict[str, Any]) -> None:
    """Write down what the shards at `url` are made of, or find it there.

    Raises:
        SourceError: if it is something else.
    """
    place = f"{url}/_plan.json"
    if not exists(place) and exists(url) and list_files(url, endings=(".tar",)):
        raise SourceError(f"{url} holds shards that came from elsewhere; give another download.place")
    if write_once(place, json.dumps(identity, indent=2).encode()):
        return
    there = json.loads(read_bytes(place))
    differing = list(differences(there, json.loads(json.dumps(identity))))
    if differing:
        raise SourceError(
            f"the shards at {url} were planned otherwise: {'; '.join(differing[:3])}; "
            "give another download.place"
        )


def _repeated(url: str, planned: ShardRanges, columns: LinkSettings) -> dict[int, tuple[int, ...]]:
    """The ordinals of rows whose URL came before, by the number of their range; found once and kept."""
    place = f"{url}/_repeated.parquet"
    if not exists(place):
        buffer = io.BytesIO()
        rows = find_repeated_urls(_urls(planned, columns))
        pq.write_table(pa.table({"row": pa.array(rows, pa.int64())}), buffer, compression="zstd")
        write_once(place, buffer.getvalue())
    rows = pq.read_table(pa.BufferReader(read_bytes(place))).column("row").to_numpy()
    found: dict[int, tuple[int, ...]] = {}
    before = 0
    for part in planned.parts({}):
        low, high = np.searchsorted(rows, [before, before + part.stop - part.start])
        if high > low:
            found[part.number] = tuple((rows[low:high] - before + part.start).tolist())
        before += part.stop - part.start
    return found


def _urls(planned: ShardRanges, columns: LinkSettings) -> Iterator[str | bytes | None]:
    """The URL of every row of every list; None where it cannot be read."""
    for links in planned.lists:
        name = read_header(links, columns).url_column
        with open_parquet(links.url) as rows:
            for batch in rows.batches([name], batch_rows=_BATCH_ROWS):
                if isinstance(batch, RowBatch):
                    yield from batch.values(name)
                else:
                    yield from [None] * (batch.stop - batch.start)
