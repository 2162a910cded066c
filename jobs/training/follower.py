"""Records the units of a growing table for the workers of a training, in a thread of its driver.

OUT.training/followed/   the records (`pipelines.loading.followed`)
"""

import itertools
import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.compute as pc

from jobs.runtime.logs import logger
from jobs.training.spec import TrainingError
from pipelines.loading.buckets import is_bucketed, total_rows
from pipelines.loading.followed import FollowedUnits, FollowingStopped, UnitRecorder, pauses
from pipelines.loading.following import units_of_span
from pipelines.loading.settings import LoaderSettings
from pipelines.loading.unit_counts import count_rows_to_train
from pipelines.storage.objects import write_once
from pipelines.storage.records import read_record
from pipelines.tables.leases import read_lease
from pipelines.tables.planned_units import PlannedUnits, replaced_unit
from pipelines.tables.table import Snapshot
from pipelines.tables.unit_files import UnitFile
from snapfusion.settings import digest


class TableStalled(RuntimeError):
    """A table has not grown while a training waited for it; the same command resumes."""


def save_sources(url: str, sources: Sequence[str]) -> str:
    """Write the names of a training's sources into the folder `url`; returns their digest."""
    key = digest({"sources": list(sources)})
    write_once(_sources_url(url, key), json.dumps({"sources": list(sources)}).encode())
    return key


def saved_sources(url: str, key: str) -> list[str]:
    """The names of the sources with this digest, in their planned order."""
    return list(read_record(_sources_url(url, key))["sources"])


def _sources_url(url: str, key: str) -> str:
    return f"{url}/sources-{key[:16]}.json"


def check_followed(table: Snapshot) -> None:
    """Refuse a table whose order cannot be known before all of its rows are.

    Raises:
        TrainingError: if its images differ in shape.
    """
    if is_bucketed(table.identity):
        raise TrainingError(
            f"{table.url} has images of several shapes, and which one a step takes follows from all of its "
            "rows: it cannot be followed; train without --follow once it is complete"
        )


class Follower:
    """Follows a table for one training.

    Args:
        table_url: of the table, absolute; it need not exist yet.
        sources: names of the sources whose units are trained on, in their planned order.
        loader: choice and order of rows.
        seconds: without a new version after which a training that waits for units is stopped.
    """

    def __init__(
        self, table_url: str, *, sources: Sequence[str], loader: LoaderSettings, seconds: float
    ) -> None:
        self._url, self._loader, self._seconds = table_url, loader, seconds
        self._planned = PlannedUnits(table_url, sources)
        self._units: list[UnitFile] = []
        self._grown = time.monotonic()
        self._ended = threading.Event()
        self._error: Exception | None = None

    def wait_for_rows(self) -> None:
        """Return once the first of the planned units that has rows is committed.

        Raises:
            TableStalled: if the table does not grow.
            TrainingError: if no planned unit has rows.
        """
        looks, began = pauses(), time.monotonic()
        logger.info(f"  waiting for the first rows of {self._url}, at most {self._seconds:g} s")
        while True:
            self._look()
            if any(unit.rows for unit in self._units):
                return
            if self._planned.complete:
                raise TrainingError(f"{self._url} is complete and has no rows to train on")
            self._check_growth(awaited=began)
            time.sleep(next(looks))

    @contextmanager
    def recording(self, url: str) -> Iterator[FollowedUnits]:
        """Record the units in the folder `url` within the context; yields what is recorded.

        Raises:
            TableStalled: in place of `FollowingStopped`, if the table does not grow while a worker waits.
            TrainingError: likewise, if the table is complete and no row is held out.
            TableError: likewise, if the file of a unit was replaced.
        """
        recorder = UnitRecorder(url, table_url=self._url)
        thread = threading.Thread(target=self._record, args=(recorder,), name="follower", daemon=True)
        thread.start()
        try:
            yield recorder.known
        except FollowingStopped as stopped:
            raise (self._error or stopped) from None
        finally:
            self._ended.set()
            thread.join()

    def _record(self, recorder: UnitRecorder) -> None:
        try:
            if not recorder.known.complete:
                self._check_recorded(recorder.known)
            while not recorder.known.complete and not self._ended.is_set():
                self._record_next(recorder)
        except Exception as error:  # noqa: BLE001 - whatever it is, workers must not wait for ever
            self._error = error
            recorder.stop(error)
            return
        if not self._ended.is_set():
            version = recorder.known.lineage["version"]
            with read_lease(self._url, version=version, purpose="a training that has followed it"):
                self._ended.wait()

    def _record_next(self, recorder: UnitRecorder) -> None:
        """Record the next units once there are enough for a span; ends with the training."""
        known, awaited = recorder.known, None
        for pause in pauses():
            began = time.monotonic()
            self._look()
            new, complete = self._units[len(known) :], self._planned.complete
            table = self._planned.table
            if table is not None and (complete or self._has_new_span(len(known))):
                self._add(recorder, new, table=table, complete=complete)
                return
            awaited = (awaited or began) if recorder.is_awaited() else None
            if awaited is not None:
                self._check_growth(awaited=awaited)
            # A look at a large table takes seconds, which the driver also needs for other things.
            if self._ended.wait(max(pause, 5 * (time.monotonic() - began))):
                return

    def _has_new_span(self, known: int) -> bool:
        # Not so many new units: the known ones may end within a span, of which the others have come.
        span = units_of_span(self._loader)
        return len(self._units) // span > known // span

    def _look(self) -> None:
        before, new = self._version(), self._planned.take()
        self._units += new
        if new or self._version() != before:
            self._grown = time.monotonic()

    def _version(self) -> int:
        return -1 if self._planned.table is None else self._planned.table.version

    def _add(
        self, recorder: UnitRecorder, units: Sequence[UnitFile], *, table: Snapshot, complete: bool
    ) -> None:
        names = pa.array([_name(unit) for unit in units], pa.string())
        files = table.units.take(pc.index_in(names, value_set=table.units.names).to_numpy())
        counted = count_rows_to_train(table.of_units(files), held_out=self._loader.held_out)
        counts = [total_rows(count) for count in counted]
        if complete and sum(unit.rows for unit in self._units) == sum(recorder.known.counts) + sum(counts):
            raise TrainingError(
                f"none of the rows of {self._url} is held out for evaluation: raise loader.held_out (now "
                f"{self._loader.held_out}), or add rows"
            )
        recorder.add(units, counts, complete=complete, lineage=table.lineage())

    def _check_recorded(self, known: FollowedUnits) -> None:
        """Refuse a table that no longer has the units that an earlier driver has recorded."""
        self._look()
        for recorded, unit in itertools.zip_longest(known[: len(known)], self._units[: len(known)]):
            if unit is None or unit.path != recorded.path:
                raise replaced_unit(recorded.path)

    def _check_growth(self, *, awaited: float) -> None:
        """Stop a training that has waited since `awaited`, by `time.monotonic`, for too long."""
        if time.monotonic() - max(awaited, self._grown) <= self._seconds:
            return
        what = "does not exist" if self._planned.table is None else "has not grown"
        raise TableStalled(
            f"{self._url} {what} after {self._seconds:g} s (follow_seconds), and the training waits for "
            f"{self._planned.next_unit}; go on with the job that makes it, and run the same command again"
        )


def _name(unit: UnitFile) -> str:
    return unit.path.rpartition("/")[2]
