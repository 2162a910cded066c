"""Commits finished units in groups as they arrive, and stops when too many rows are rejected."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from pipelines.storage.objects import list_parquet
from pipelines.tables.commits import Origin, WrittenUnit, commit_units, read_written_unit, restore_manifests
from pipelines.tables.manifest import UnitManifest
from pipelines.tables.merging import FAN_IN, merge_unit_files
from pipelines.tables.network_time import NetworkTime, UnitSpan
from pipelines.tables.open_log import TableLogs
from pipelines.tables.settings import Bounds
from pipelines.tables.table import Snapshot, TableError, open_table
from pipelines.tables.unit_files import unit_of
from snapfusion.settings import digest


class TooManyRejected(RuntimeError):
    """The rejected fraction exceeds its bound; committed units stay, and the job stops."""


@dataclass(frozen=True, kw_only=True)
class CommitProgress:
    """The progress of a job.

    Attributes:
        rows: rows read.
        total: rows to read; None if the sources do not state it.
        rejected: rows rejected.
        units: units that have arrived.
        first_rows: rows read of the first unit.
        first_time: time by `time.monotonic` at which the first unit arrived.
        steady_seconds: seconds from then to the last unit.
        reasons: rejected rows by reason.
        shards: sources that were read to their end.
        rejected_shards: those of them that were torn, no shard, or another one than before.
        network_time: of the workers whose network computed the units.
    """

    rows: int = 0
    total: int | None = None
    rejected: int = 0
    units: int = 0
    first_rows: int = 0
    first_time: float = 0.0
    steady_seconds: float = 0.0
    reasons: Mapping[str, int] = field(default_factory=dict)
    shards: int = 0
    rejected_shards: int = 0
    network_time: NetworkTime = field(default_factory=NetworkTime)

    @property
    def rate(self) -> float | None:
        """Rows a second since the first unit arrived, which leaves out the start of workers; None before."""
        return (self.rows - self.first_rows) / self.steady_seconds if self.steady_seconds > 0 else None

    @property
    def seconds_left(self) -> float | None:
        """The time left at the present rate; None if the rate or the total is unknown."""
        return None if self.total is None or not self.rate else max(self.total - self.rows, 0) / self.rate

    def advanced(
        self,
        *,
        rows: int,
        rejected: int,
        reasons: Mapping[str, int] | None = None,
        span: UnitSpan | None = None,
    ) -> CommitProgress:
        """The progress after one more unit, which has arrived now."""
        now = time.monotonic()
        first_rows, first_time = (self.first_rows, self.first_time) if self.units else (rows, now)
        return replace(
            self,
            rows=self.rows + rows,
            rejected=self.rejected + rejected,
            units=self.units + 1,
            first_rows=first_rows,
            first_time=first_time,
            steady_seconds=now - first_time,
            reasons=Counter(self.reasons) + Counter(reasons),
            network_time=self.network_time.with_span(span),
        )

    def with_shards(self, manifest: UnitManifest) -> CommitProgress:
        """The progress with the shard that this unit ends, if it does."""
        torn = manifest.tear is not None
        return replace(self, shards=self.shards + manifest.final, rejected_shards=self.rejected_shards + torn)


OnProgress = Callable[[CommitProgress], None]

Item = TypeVar("Item")


def take_rows(items: Iterable[Item], *, bounds: Bounds, rows: Callable[[Item], int | None]) -> Iterator[Item]:
    """The first items that together have `bounds.max_rows` rows, rounded up; unknown sizes count as 0.

    A bounded run so sends no more into its workers than it will commit.
    """
    left = bounds.max_rows
    for item in items:
        # Checked first, so that no item is drawn from a lazy source once there are enough.
        if left is not None and left <= 0:
            break
        yield item
        left = None if left is None else left - (rows(item) or 0)


def recover(table: Snapshot, *, origin: Origin | None = None) -> Snapshot:
    """Commit the data files that a killed run left uncommitted, and restore manifests; returns the table.

    A data file is written whole or not at all and carries its manifest, so it is committed as it is.

    Raises:
        TableError: if there is a data file that no unit of this table wrote.
    """
    committed = {file.unit for file in table.units}
    # Other files of a committed unit are no orphans: it has replaced them, or they were to replace it.
    orphans = [name for name in list_parquet(table.url) if unit_of(name) not in committed]
    units = [read_written_unit(f"{table.url}/{name}") for name in orphans]
    for unit in units:
        if unit.manifest.settings != digest(table.identity):
            raise TableError(f"{unit.path} was made with other settings than this table; remove it")
    if units:
        commit_units(table.url, units, origin=origin)
        table = open_table(table.url)
    return restore_manifests(table)


def commit_stream(
    table: Snapshot,
    finished: Iterable[WrittenUnit],
    *,
    bounds: Bounds,
    total: int | None,
    origin: Origin | None = None,
    on_progress: OnProgress | None = None,
) -> Snapshot:
    """Commit units as they arrive; returns the table at its newest version.

    Args:
        table: to commit to.
        finished: units in order of completion; closed early where a bound is met.
        bounds: when to commit and when to stop.
        total: rows to read, if that is known.
        origin: provenance of the units.
        on_progress: called after each unit.

    Raises:
        TooManyRejected: when more than `bounds.max_rejected` of the rows read are rejected, or more than
            `bounds.max_rejected_shards` of the shards.
    """
    progress, committer = CommitProgress(total=total), _Committer(table.url, origin)
    pending: list[WrittenUnit] = []
    started = committed = time.monotonic()
    for unit in finished:
        now = time.monotonic()
        # Grouped, since each commit is three log entries, and a reader replays the log to open the table.
        pending.append(unit)
        manifest = unit.manifest
        progress = progress.advanced(
            rows=manifest.rows_read,
            rejected=len(manifest.rejections),
            reasons=manifest.rejected(),
            span=unit.span,
        ).with_shards(manifest)
        if now - committed >= bounds.commit_seconds:
            committer.commit(pending)
            pending, committed = [], now
        try:
            check_bounds(progress, bounds, url=table.url)
        except TooManyRejected:
            # Committed before the job stops: the rejected rows are the evidence of what is wrong.
            committer.commit(pending)
            raise
        if on_progress:
            on_progress(progress)
        if _reached_bound(progress, bounds, seconds=now - started):
            break
    committer.commit(pending)
    return committer.finish() if progress.units else table


class _Committer:
    """Commits to one table, whose logs stay open between the commits."""

    def __init__(self, url: str, origin: Origin | None) -> None:
        self._url, self._origin = url, origin
        self._logs, self._commits = TableLogs.of(url), 0

    def commit(self, units: Sequence[WrittenUnit]) -> None:
        commit_units(self._url, units, origin=self._origin, logs=self._logs)
        self._commits += 1
        # Not in each commit: merging reads files of `.units`.
        if self._commits % FAN_IN == 0:
            merge_unit_files(self._logs.units)

    def finish(self) -> Snapshot:
        """The table at its newest version."""
        # Short runs merge the files of their predecessors.
        merge_unit_files(self._logs.units)
        return self._logs.newest_table()


def check_bounds(progress: CommitProgress, bounds: Bounds, *, url: str) -> None:
    """Check the rejected fractions of rows and shards of the table at `url`.

    Raises:
        TooManyRejected: if one exceeds its bound.
    """
    for total, rejected, what, judged_after, setting in (
        (progress.rows, progress.rejected, "rows", bounds.judged_after, "max_rejected"),
        (
            progress.shards,
            progress.rejected_shards,
            "shards",
            bounds.shards_judged_after,
            "max_rejected_shards",
        ),
    ):
        bound = getattr(bounds, setting)
        if total >= judged_after and rejected > bound * total:
            raise TooManyRejected(
                f"{rejected} of {total} {what} were rejected, more than the bound of {bound:.0%}; look at "
                f"the reasons in {url}.rejects, then mend the source or raise {setting}"
            )


def _reached_bound(progress: CommitProgress, bounds: Bounds, *, seconds: float) -> bool:
    rows_reached = bounds.max_rows is not None and progress.rows >= bounds.max_rows
    return rows_reached or (bounds.max_seconds is not None and seconds >= bounds.max_seconds)
