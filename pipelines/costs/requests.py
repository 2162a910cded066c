"""Counts the storage requests of committing a table and of training on it.

The counts are those of an S3 server (`test_plan_requests.py` counts them again). They leave out startup,
restarts, merges of `.units`, checkpoints of the logs, reading of source shards and checks for results that
exist already.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

_GETS_PER_COMMIT = 6
"""Of one log: it stays open, and a commit follows it from its last entry, however many there are."""
_GETS_PER_OPENING = 2
_LISTS_PER_COMMIT = 3
_LISTS_PER_OPENING = 1
_GETS_PER_UNIT = 4
"""One HEAD, the first page's header (once a process), the footer, and the columns with all between them."""
_PART_BYTES = 50 * 2**20
"""Size of one part of a multipart upload."""


@dataclass(frozen=True, kw_only=True)
class Requests:
    """Numbers of storage requests.

    Attributes:
        put: PUT and POST.
        get: GET and HEAD.
        list: LIST, which is priced as PUT.
    """

    put: float = 0.0
    get: float = 0.0
    list: float = 0.0


@dataclass(frozen=True, kw_only=True)
class TableWrites:
    """Commits of a table.

    Attributes:
        units: data files.
        commit_seconds: units that arrive within this time share a commit.
        rejects: whether commits include rejected rows.
    """

    units: int
    commit_seconds: float
    rejects: bool = False

    def commits(self, seconds: float) -> int:
        """Number of commits in so many seconds."""
        return min(self.units, 1 + int(seconds / self.commit_seconds) if self.commit_seconds else self.units)

    def requests(self, seconds: float) -> Requests:
        """Requests for the data files, and for the logs of the table, of `.units` and of `.rejects`."""
        commits = self.commits(seconds)
        siblings = 2 if self.rejects else 1
        logs = 1 + siblings
        return Requests(
            put=self.units + commits * (logs + siblings),
            get=logs * (_GETS_PER_OPENING + commits * _GETS_PER_COMMIT),
            list=logs * (_LISTS_PER_OPENING + commits * _LISTS_PER_COMMIT),
        )


@dataclass(frozen=True, kw_only=True)
class TrainingReads:
    """Reads of a table by a training, and its checkpoints.

    Attributes:
        steps: of the optimizer.
        global_batch: rows of a step.
        window_units: units whose rows are shuffled together.
        lanes: of the order of rows, each of which reads units of its own.
        unit_rows: rows of one unit.
        row_bytes: of all columns of a row.
        checkpoints: saved.
        checkpoint_bytes: of one checkpoint, by file.
    """

    steps: int
    global_batch: int
    window_units: int
    unit_rows: int
    row_bytes: float
    lanes: int = 1
    checkpoints: int = 0
    checkpoint_bytes: tuple[float, ...] = ()

    def units(self, *, workers: int) -> float:
        """Number of units that all workers together read (`pipelines.loading.order.rank_share`).

        With lanes each worker reads those of its own; where a share ends within a lane, two read its units.
        Without, a batch, or a window if that is larger, is cut into runs of files. Two runs that meet within
        a file both read it, and where the cut lies differs a little from one batch of a window to the next.
        """
        if self.lanes > 1:
            aligned = self.lanes % workers == 0 and self.global_batch % self.lanes == 0
            shared = 0.0 if aligned else (workers - 1) / self.lanes
            return self.steps * self.global_batch / self.unit_rows * (1 + shared)
        window = self.window_units * self.unit_rows
        units = max(self.window_units, self.global_batch / self.unit_rows)
        shared = (self.global_batch / workers - 1) * units / self.global_batch + 1
        if self.global_batch < window:
            shared += units / (2 * math.sqrt(self.global_batch))
        windows = max(1.0, self.steps * self.global_batch / max(self.global_batch, window))
        return windows * (units if workers == 1 else workers * min(units, shared))

    def read_bytes(self, *, workers: int) -> float:
        """Bytes that all workers read from the store."""
        return self.units(workers=workers) * self.unit_rows * self.row_bytes

    def requests(self, *, workers: int) -> Requests:
        """Requests of all workers for rows, and of the first one for checkpoints."""
        parts = sum(math.ceil(size / _PART_BYTES) + 2 for size in self.checkpoint_bytes)
        return Requests(put=self.checkpoints * (parts + 1), get=self.units(workers=workers) * _GETS_PER_UNIT)
