"""Takes finished units in as they arrive: commits them in groups, counts, stops when too much is rejected."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from pipelines.storage.objects import absolute_url, list_parquet
from pipelines.tables.commits import Origin, WrittenUnit, commit_units, read_written_unit, restore_manifests
from pipelines.tables.settings import Bounds
from pipelines.tables.table import TableError, open_table, unit_of
from snapfusion.settings import digest


class TooManyRejected(RuntimeError):
    """The rejected fraction is above its bound; what was committed stays, and the job stops."""


@dataclass(frozen=True, kw_only=True)
class CommitProgress:
    """How far a job is. Rows are rows read; `total` is None where the sources do not say.

    `reasons` has the rejected rows by their reason.
    """

    rows: int
    total: int | None
    rejected: int
    units: int
    first_rows: int
    steady_seconds: float
    reasons: Mapping[str, int] = field(default_factory=dict)

    @property
    def rate(self) -> float | None:
        """Rows a second since the first unit arrived, so without the start of workers; None before that."""
        return (self.rows - self.first_rows) / self.steady_seconds if self.steady_seconds > 0 else None

    @property
    def seconds_left(self) -> float | None:
        """At the rate so far; None where rate or total is not known."""
        return None if self.total is None or not self.rate else max(self.total - self.rows, 0) / self.rate


OnProgress = Callable[[CommitProgress], None]

Item = TypeVar("Item")


def take_rows(items: Iterable[Item], *, bounds: Bounds, rows: Callable[[Item], int | None]) -> list[Item]:
    """The first items that together have `bounds.max_rows` rows, rounded up; one of unknown size has none.

    So a bounded run sends no more into its workers than it will commit.
    """
    chosen: list[Item] = []
    left = bounds.max_rows
    for item in items:
        if left is not None and left <= 0:
            break
        chosen.append(item)
        left = None if left is None else left - (rows(item) or 0)
    return chosen


def recover(url: str, *, origin: Origin | None = None) -> int:
    """Commit the data files that a killed run left uncommitted, and restore lost accounts; returns how many.

    A data file is written whole or not at all, and states its own account: it stands as it is.

    Raises:
        TableError: if a file lies there that no unit of this table wrote.
    """
    location = absolute_url(url)
    table = open_table(url)
    committed = {file.unit for file in table.units}
    # Of a committed unit other files may lie there: one that was replaced, one that was to replace it.
    orphans = [f"{location}/{name}" for name in list_parquet(location) if unit_of(name) not in committed]
    waiting = [read_written_unit(orphan) for orphan in orphans]
    for file in waiting:
        if file.account.settings != digest(table.identity):
            raise TableError(f"{file.path} was made with other settings than this table; remove it")
    commit_units(url, waiting, origin=origin)
    return len(waiting) + restore_manifests(url)


def commit_stream(
    url: str,
    finished: Iterable[WrittenUnit],
    *,
    bounds: Bounds,
    total: int | None,
    origin: Origin | None = None,
    on_progress: OnProgress | None = None,
) -> CommitProgress:
    """Commit units while they arrive; returns the last progress.

    Args:
        url: of the table.
        finished: units, as they are finished; closed early where a bound is met.
        bounds: when to commit and when to stop.
        total: rows that are to be read, if that is known.
        origin: who makes the units.
        on_progress: called after each unit.

    Raises:
        TooManyRejected: when more than `bounds.max_rejected` of the rows read were set aside.
    """
    progress = CommitProgress(rows=0, total=total, rejected=0, units=0, first_rows=0, steady_seconds=0.0)
    waiting: list[WrittenUnit] = []
    began = first = committed = time.monotonic()
    for file in finished:
        now = time.monotonic()
        first = first if progress.units else now
        waiting.append(file)
        progress = _advance(progress, file, steady_seconds=now - first)
        if now - committed >= bounds.commit_seconds:
            commit_units(url, waiting, origin=origin)
            waiting, committed = [], now
        if _too_many(progress, bounds):
            commit_units(url, waiting, origin=origin)
            raise TooManyRejected(
                f"{progress.rejected} of {progress.rows} rows were rejected, more than the bound of "
                f"{bounds.max_rejected:.0%}; look at the reasons in {url}.rejects, then mend the source or "
                "raise max_rejected"
            )
        if on_progress:
            on_progress(progress)
        if _is_enough(progress, bounds, seconds=now - began):
            break
    commit_units(url, waiting, origin=origin)
    return progress


def _advance(progress: CommitProgress, file: WrittenUnit, *, steady_seconds: float) -> CommitProgress:
    rows = file.account.rows_read
    return CommitProgress(
        rows=progress.rows + rows,
        total=progress.total,
        rejected=progress.rejected + len(file.account.rejections),
        units=progress.units + 1,
        first_rows=progress.first_rows if progress.units else rows,
        steady_seconds=steady_seconds,
        reasons=Counter(progress.reasons) + Counter(file.account.rejected()),
    )


def _too_many(progress: CommitProgress, bounds: Bounds) -> bool:
    judged = progress.rows >= bounds.judged_after
    return judged and progress.rejected > bounds.max_rejected * progress.rows


def _is_enough(progress: CommitProgress, bounds: Bounds, *, seconds: float) -> bool:
    enough_rows = bounds.max_rows is not None and progress.rows >= bounds.max_rows
    return enough_rows or (bounds.max_seconds is not None and seconds >= bounds.max_seconds)
