"""Reads the files of the batches to come, each once, and keeps them as long as they are needed."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

Rows = TypeVar("Rows")
File = tuple[int, int]
"""A window and the turn of one of its units: each epoch reads a unit anew."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """A rank's part of a global batch.

    Attributes:
        rows: `pipelines.loading.order.ROW` [any].
        end: position after the batch's last row.
    """

    rows: np.ndarray
    end: int


def read_ahead(
    shares: Iterator[Share],
    *,
    read: Callable[[int], Future[Rows]],
    ahead: int,
    ready: Callable[[int], bool],
) -> Iterator[tuple[Share, Mapping[File, Future[Rows]]]]:
    """Each share with its files, while those of the next `ahead` positions are being read.

    Args:
        shares: of successive batches, without end.
        read: begins to read a unit.
        ahead: positions; the next batch is read ahead in any case.
        ready: whether the share after a position is there without a wait; no other is read ahead.
    """
    files: dict[File, Future[Rows]] = {}
    until: dict[File, int] = {}
    upcoming = deque[Share]()
    while True:
        # Shares are numbers and cost next to nothing; files cost memory.
        while not upcoming or (
            (len(upcoming) < 2 or upcoming[-1].end < upcoming[0].end + ahead) and ready(upcoming[-1].end)
        ):
            upcoming.append(next(shares))
            for window, turn, unit, last in _files_of(upcoming[-1].rows):
                # Consecutive shares lie in the same files: each is submitted once, in the order of first use.
                if (window, turn) not in files:
                    files[window, turn], until[window, turn] = read(unit), last
        share = upcoming.popleft()
        yield share, files
        for file in [file for file, last in until.items() if last <= share.end]:
            del files[file], until[file]


def _files_of(rows: np.ndarray) -> Iterator[tuple[int, int, int, int]]:
    """Window, turn, unit and end of each file of a share, in the order of first use."""
    columns = (rows[name].tolist() for name in ("window", "turn", "unit", "until"))
    yield from dict.fromkeys(zip(*columns, strict=True))
