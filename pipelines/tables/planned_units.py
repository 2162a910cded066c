"""Follows a table that is being written: its units in the order in which they are planned, not of arrival.

The units of a source lead without a gap from its first row to a final unit. So the next unit is known by its
source and first row before it is made, and a source ends with its first final unit, however few rows it has.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.tables.open_log import OpenLog
from pipelines.tables.table import Snapshot, TableError, is_table
from pipelines.tables.unit_files import UnitFile


class PlannedUnits:
    """The units of planned sources of a growing table.

    Attributes:
        table: the newest version that was read; None before there is a table.

    Args:
        url: of the table, absolute; it need not exist yet.
        sources: names of the sources, in their planned order; units of others are left out.
    """

    def __init__(self, url: str, sources: Sequence[str]) -> None:
        self.table: Snapshot | None = None
        self._log = OpenLog(url)
        self._sources, self._planned = sources, frozenset(sources)
        # The source and the first row of the next unit.
        self._source, self._start = 0, 0
        self._arrived: dict[tuple[str, int], tuple[int, bool, UnitFile]] = {}
        self._seen: set[str] = set()
        self._taken: list[str] = []
        self._lacks_manifests = False

    @property
    def complete(self) -> bool:
        """Whether all planned units were taken."""
        return self._source == len(self._sources)

    @property
    def next_unit(self) -> str:
        """The unit that comes next, in words."""
        return f"the unit of {self._sources[self._source]} from row {self._start} on"

    def take(self) -> list[UnitFile]:
        """The units that have come since the last call, as far as none before them is missing.

        Raises:
            TableError: if the file of a unit that was taken has been replaced: rows of it were forgotten.
        """
        if self.table is None and not is_table(self._log.location):
            return []
        delta = self._log.newest()
        # A manifest is appended after the commit of its unit, which is in no new version then.
        if self.table is None or delta.version() > self.table.version or self._lacks_manifests:
            self.table = Snapshot(self._log.location, delta)
            self._check_taken(self.table)
            self._arrive(self.table)
        units = list(self._advance())
        self._taken += [file.path.rpartition("/")[2] for file in units]
        return units

    def _check_taken(self, table: Snapshot) -> None:
        taken = pa.array(self._taken, pa.string())
        if gone := taken.filter(pc.invert(pc.is_in(taken, value_set=table.units.names))).to_pylist():
            raise replaced_unit(f"{table.url}/{gone[0]}")

    def _arrive(self, table: Snapshot) -> None:
        """Read the manifests of the units that were not seen before."""
        seen = pc.is_in(table.units.unit_names, value_set=pa.array(sorted(self._seen), pa.string()))
        new = table.units.take(np.flatnonzero(~seen.to_numpy(zero_copy_only=False)))
        manifests = table.of_units(new).manifests() if len(new) else {}
        self._lacks_manifests = len(manifests) < len(new)
        for file in new:
            if manifest := manifests.get(file.unit):
                self._seen.add(file.unit)
                if manifest.source in self._planned:
                    arrived = manifest.stop, manifest.final, file
                    self._arrived[manifest.source, manifest.start] = arrived

    def _advance(self) -> Iterator[UnitFile]:
        while not self.complete:
            arrived = self._arrived.pop((self._sources[self._source], self._start), None)
            if arrived is None:
                return
            stop, final, file = arrived
            # What follows a final unit belongs to a later reading of a shard that was torn.
            self._source, self._start = (self._source + 1, 0) if final else (self._source, stop)
            yield file


def replaced_unit(path: str) -> TableError:
    """The error of a unit whose file is no longer the one that was taken."""
    return TableError(
        f"{path} was replaced while a training followed the table, because rows of it were forgotten; remove "
        "the unfinished training, and begin it anew"
    )
