"""The units of a growing table as far as they are known: records that one process writes and others read.

URL/000000.json    the first units in their planned order, their rows to train on, and the table's version
URL/000001.json    the next ones
URL/awaited.json   the number of the record that a reader waits for
URL/stopped.json   why no more records come

How many units a record holds depends on when they were committed; their order does not. A record is written
once, so whoever resumes reads the units that were read before.
"""

import itertools
import json
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Final, overload

import fsspec

from pipelines.storage.objects import IO_THREADS, exists, list_names, replace_object, write_once
from pipelines.storage.records import read_record
from pipelines.tables.unit_files import UnitFile, unit_of

_FIRST_PAUSE: Final = 0.2
_LONGEST_PAUSE: Final = 2.0
_AWAITED: Final = "awaited.json"
_STOPPED: Final = "stopped.json"


class FollowingStopped(RuntimeError):
    """No more units will be recorded; the message says why."""


class WaitInterrupted(Exception):
    """Raised in place of a wait that `FollowedUnits.interrupt` ended."""


def pauses() -> Iterator[float]:
    """Seconds before each look for something new, longer and longer ones."""
    return (min(_FIRST_PAUSE * 1.5**look, _LONGEST_PAUSE) for look in itertools.count())


class FollowedUnits(Sequence[UnitFile]):
    """The units of a growing table in their planned order, read from records as they are needed.

    An index that is not known yet is waited for, and so is the end.

    Attributes:
        counts: rows to train on of each known unit.
        ends: their sums up to each unit.
        complete: whether all units are known.
        records: number of the records read.
        lineage: of the table's version that has all known units (`Snapshot.lineage`); empty before the first.

    Args:
        url: of the records' folder.
        table_url: of the table.
    """

    def __init__(self, url: str, *, table_url: str) -> None:
        self.counts: list[int] = []
        self.ends: list[int] = []
        self.complete, self.records = False, 0
        self.lineage: Mapping[str, Any] = {}
        self._url, self._table_url = url, table_url
        self._files: list[UnitFile] = []
        self._interrupted = threading.Event()
        self._looked = -_LONGEST_PAUSE

    def __len__(self) -> int:
        return len(self._files)

    @overload
    def __getitem__(self, index: int) -> UnitFile: ...

    @overload
    def __getitem__(self, index: slice) -> list[UnitFile]: ...

    def __getitem__(self, index: int | slice) -> UnitFile | list[UnitFile]:
        if isinstance(index, int):
            self.wait_for(index + 1)
        return self._files[index]

    def wait_for(self, count: int) -> None:
        """Return once the first `count` units are known, or all.

        Raises:
            FollowingStopped: if no more are recorded.
            WaitInterrupted: if `interrupt` was called.
        """
        awaited = -1
        for pause in pauses():
            stopped = exists(f"{self._url}/{_STOPPED}")
            # In this order, since the last record comes before the stop: all readers end at the same unit.
            if self._known(count) or (self.refresh() and self._known(count)):
                return
            if stopped:
                raise FollowingStopped(read_record(f"{self._url}/{_STOPPED}")["error"])
            if awaited != self.records:
                awaited = self.records
                replace_object(f"{self._url}/{_AWAITED}", json.dumps({"record": awaited}).encode())
            if self._interrupted.wait(pause):
                raise WaitInterrupted

    def knows(self, count: int) -> bool:
        """Whether the first `count` units are known, or all; looks for records now and then."""
        if not self._known(count) and time.monotonic() > self._looked + _FIRST_PAUSE:
            self.refresh()
        return self._known(count)

    def _known(self, count: int) -> bool:
        return self.complete or len(self) >= count

    def refresh(self) -> bool:
        """Read the records that are new; whether there were any."""
        self._looked = time.monotonic()
        if self.complete or not exists(self._path(self.records)):
            return False
        last = max(int(name[:6]) for name in list_names(self._url) if name[:6].isdecimal())
        with ThreadPoolExecutor(IO_THREADS) as readers:
            for record in readers.map(read_record, map(self._path, range(self.records, last + 1))):
                self._add(record)
        return True

    def interrupt(self) -> None:
        """End the waits, also those to come."""
        self._interrupted.set()

    def resume(self) -> None:
        """Wait again, after an interrupt."""
        self._interrupted.clear()

    def _add(self, record: Mapping[str, Any]) -> None:
        for name, rows, size, count in record["units"]:
            path = f"{self._table_url}/{name}"
            self._files.append(UnitFile(unit=unit_of(name), path=path, rows=rows, size=size))
            self.counts.append(count)
            self.ends.append(count + (self.ends[-1] if self.ends else 0))
        self.records += 1
        self.complete, self.lineage = record["complete"], record["table"]

    def _path(self, number: int) -> str:
        return f"{self._url}/{number:06d}.json"


class UnitRecorder:
    """Writes the records that `FollowedUnits` reads; one process at a time.

    Attributes:
        known: what is recorded.

    Args:
        url: of the records' folder.
        table_url: of the table.
    """

    def __init__(self, url: str, *, table_url: str) -> None:
        self._url = url
        # Of an earlier process, and none of this one's readers has begun.
        filesystem, folder = fsspec.core.url_to_fs(url)
        for name in (_AWAITED, _STOPPED):
            with suppress(FileNotFoundError):
                filesystem.rm_file(f"{folder}/{name}")
        self.known = FollowedUnits(url, table_url=table_url)
        self.known.refresh()

    def add(
        self,
        units: Sequence[UnitFile],
        counts: Sequence[int],
        *,
        complete: bool,
        lineage: Mapping[str, Any],
    ) -> None:
        """Record the next units.

        Args:
            units: in their planned order.
            counts: their rows to train on.
            complete: whether they are the last.
            lineage: of a version of the table that has all units so far.
        """
        listed = [
            [unit.path.rpartition("/")[2], unit.rows, unit.size, count]
            for unit, count in zip(units, counts, strict=True)
        ]
        record = {"table": lineage, "units": listed, "complete": complete}
        write_once(f"{self._url}/{self.known.records:06d}.json", json.dumps(record).encode())
        self.known.refresh()

    def is_awaited(self) -> bool:
        """Whether a reader waits for the next record."""
        url = f"{self._url}/{_AWAITED}"
        return exists(url) and read_record(url)["record"] == self.known.records

    def stop(self, error: Exception) -> None:
        """Record that no more units come, which ends the waits of all readers with this error's message."""
        replace_object(f"{self._url}/{_STOPPED}", json.dumps({"error": str(error)}).encode())
