"""Requests to an object store: what committing a table and training on it ask for, counted as the code asks.

The numbers are those of a server of S3's protocol (`tests/jobs/test_plan_requests.py` counts them again).
Start-up, restarts, the shards that are read and the tests for what is there already are left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from jobs.planning.prices import StoragePrices

CHECKPOINT_COMMITS = 100
"""After so many the log is summed up, and what is older is not read again."""
_LOADS = 2
"""Of the log at each commit: to look a unit up, and by the writer."""
_GETS_A_LOAD = 2
"""Of each entry since the log was last summed up."""
_GETS_A_COMMIT = 3
_LISTS_A_COMMIT = 3
_GETS_A_SUM = 11
"""Of the parts of what sums the log up, at each load."""
_GETS_A_UNIT = 3
"""One HEAD, the footer, and the columns with all that lies between them."""
_BLOCK = 50 * 2**20
"""Bytes of one part of a large object."""


@dataclass(frozen=True, kw_only=True)
class Requests:
    """How many of each.

    Attributes:
        put: PUT and POST.
        get: GET and HEAD.
        list: LIST, which is priced as PUT.
    """

    put: float = 0.0
    get: float = 0.0
    list: float = 0.0

    def __add__(self, other: Requests) -> Requests:
        return Requests(put=self.put + other.put, get=self.get + other.get, list=self.list + other.list)

    def cost(self, prices: StoragePrices) -> float:
        """What they cost."""
        return ((self.put + self.list) * prices.put_1000 + self.get * prices.get_1000) / 1000.0


NO_REQUESTS = Requests()


@dataclass(frozen=True, kw_only=True)
class TableWrites:
    """A table that is committed while it is made.

    Attributes:
        units: data files.
        commit_seconds: units that arrive within this time share a commit.
        rejects: whether every commit has rejected rows to tell of.
    """

    units: int
    commit_seconds: float
    rejects: bool

    def commits(self, seconds: float) -> int:
        """How many there are in so many seconds."""
        return min(self.units, 1 + int(seconds / self.commit_seconds) if self.commit_seconds else self.units)

    def requests(self, seconds: float) -> Requests:
        """Of the data files, and of the logs of the table, of `.units` and of `.rejects`."""
        commits = self.commits(seconds)
        siblings = 2 if self.rejects else 1
        logs = 1 + siblings
        return Requests(
            put=self.units + commits * (logs + siblings),
            get=logs * _gets_of_log(commits),
            list=logs * commits * _LISTS_A_COMMIT,
        )


def _gets_of_log(commits: int) -> float:
    """GETs of one log in so many commits, each of which reads all entries since it was last summed up."""
    sums, left = divmod(commits, CHECKPOINT_COMMITS)
    entries = sums * _sum_to(CHECKPOINT_COMMITS) + _sum_to(left)
    after_a_sum = max(0, commits - CHECKPOINT_COMMITS)
    return _LOADS * (_GETS_A_LOAD * entries + _GETS_A_SUM * after_a_sum) + _GETS_A_COMMIT * commits


def _sum_to(count: int) -> float:
    return count * (count + 1) / 2


@dataclass(frozen=True, kw_only=True)
class TrainingReads:
    """A training that reads a table and saves checkpoints.

    Attributes:
        steps: of the optimizer.
        global_batch: rows of a step.
        window_units: units whose rows are shuffled together.
        unit_rows: of one unit.
        row_bytes: of a row, of all columns.
        checkpoints: that are saved.
        checkpoint_bytes: of one of them, by file.
    """

    steps: int
    global_batch: int
    window_units: int
    unit_rows: int
    row_bytes: float
    checkpoints: int
    checkpoint_bytes: tuple[float, ...]

    def units(self, *, workers: int) -> float:
        """How many are read, by all workers together (`pipelines.loading.order.rank_share`).

        A batch, or a window if that is larger, is cut into runs of files; a file that two runs meet in is
        read by both, and where the cut lies differs a little from one batch of a window to the next.
        """
        window = self.window_units * self.unit_rows
        units = max(self.window_units, self.global_batch / self.unit_rows)
        met = (self.global_batch / workers - 1) * units / self.global_batch + 1
        if self.global_batch < window:
            met += units / (2 * math.sqrt(self.global_batch))
        times = max(1.0, self.steps * self.global_batch / max(self.global_batch, window))
        return times * (units if workers == 1 else workers * min(units, met))

    def read_bytes(self, *, workers: int) -> float:
        """That all workers read from the store."""
        return self.units(workers=workers) * self.unit_rows * self.row_bytes

    def requests(self, *, workers: int) -> Requests:
        """Of all workers, and of the checkpoints of the first."""
        parts = sum(math.ceil(size / _BLOCK) + 2 for size in self.checkpoint_bytes)
        return Requests(
            put=self.checkpoints * (parts + 1),
            get=self.units(workers=workers) * _GETS_A_UNIT,
        )
