"""Compares a table's log with its folder and its siblings, both ways.

Each of them names units: the log decides which are committed, the folder has their data files, `.units` has a
row and `.rejects` the rejected rows of each. Whatever one of them lacks, the others still show.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.storage.objects import list_parquet
from pipelines.tables.commits import WrittenUnit, reject_rows, unit_row
from pipelines.tables.table import Snapshot, open_delta, open_table, read_sibling
from pipelines.tables.transactions import app_id
from pipelines.tables.unit_files import UnitFile, revised_name, unit_of

_Rows = Mapping[str, Sequence[Mapping[str, Any]]]

_LATER_COLUMNS = ("file", "held_out_keys", "shapes")
"""Columns of `.units` that rows of earlier versions lack."""


@dataclass(frozen=True, kw_only=True)
class LostUnit:
    """A unit that was committed, as all but the log show.

    Attributes:
        unit: its name.
        file: name of the file that can be committed again; None if there is none, or which of several it is
            does not follow.
        sha256: of that file, as `.units` records it; None if it has no row of the unit.
    """

    unit: str
    file: str | None
    sha256: str | None


@dataclass(frozen=True, kw_only=True)
class UnitStates:
    """What log, folder and siblings say of a table's units.

    Attributes:
        table: the snapshot that is verified.
        recorded: rows of `.units` by unit, of uncommitted units too.
        rejected: rows of `.rejects` by unit, of uncommitted units too.
        files: names of the data files in the folder, by unit.
    """

    table: Snapshot
    recorded: _Rows
    rejected: _Rows
    files: Mapping[str, Sequence[str]]

    @classmethod
    def read(cls, table: Snapshot) -> "UnitStates":
        """Read all of them; `table` was opened before, so they know whatever it knows."""
        names = defaultdict[str, list[str]](list)
        for name in list_parquet(table.url):
            names[unit_of(name)].append(name)
        return cls(
            table=table,
            recorded=_by_unit(read_sibling(f"{table.url}.units")),
            rejected=_by_unit(read_sibling(f"{table.url}.rejects")),
            files=names,
        )

    def lost_units(self) -> list[LostUnit]:
        """The units that were committed and are missing in the newest version of the log."""
        known = {file.unit for file in self.table.units}
        missing = (self.recorded.keys() | self.rejected.keys() | self.files.keys()) - known
        if missing:
            # Others may have committed them since the snapshot was opened.
            missing -= {file.unit for file in open_table(self.table.url).units}
        delta = open_delta(self.table.url) if missing else None
        return [
            self._lost(unit)
            for unit in sorted(missing)
            if unit in self.recorded
            # Rejected rows come before the rows, and the file before both: a killed run leaves that.
            or unit not in self.files
            or (delta is not None and delta.transaction_version(app_id(unit)) is not None)
        ]

    def _lost(self, unit: str) -> LostUnit:
        files, rows = self.files.get(unit, ()), self.recorded.get(unit, ())
        for row in rows:
            for name in (revised_name(unit, row["account"]), f"{unit}.parquet"):
                if name in files:
                    return LostUnit(unit=unit, file=name, sha256=row["sha256"])
        return LostUnit(unit=unit, file=files[0] if len(files) == 1 and not rows else None, sha256=None)

    def uncommitted_files(self) -> int:
        """The number of data files of units that nothing but the folder names."""
        known = {file.unit for file in self.table.units} | self.recorded.keys()
        return sum(len(names) for unit, names in self.files.items() if unit not in known)

    def is_replaced(self, file: UnitFile) -> bool:
        """Whether `.units` has the row of a file that replaced this one, which the log still names."""
        revisions = {revised_name(file.unit, row["account"]) for row in self.recorded.get(file.unit, ())}
        own = file.path.rpartition("/")[2]
        return own not in revisions and not revisions.isdisjoint(self.files.get(file.unit, ()))

    def sibling_faults(self, written: WrittenUnit) -> Iterator[str]:
        """The differences of the siblings' rows from the manifest of a unit's data file."""
        unit = written.manifest.unit
        rows = self.recorded.get(unit, ())
        if not rows:
            yield f"unit {unit} has no row in the units table; the next job on the table restores it"
        if len(rows) > 1:
            yield f"unit {unit} has {len(rows)} rows in the units table"
        for row in rows[:1]:
            for name, value in unit_row(written).items():
                is_earlier = name in _LATER_COLUMNS and row.get(name) is None
                if row.get(name) == value or name == "sha256" or is_earlier:
                    continue
                if name == "account":
                    yield f"unit {unit}: its manifest in the units table differs from that of its file"
                else:
                    yield f"unit {unit}: {name} is {row[name]} in the units table and {value} in its file"
        if _sorted(self.rejected.get(unit, ())) != _sorted(reject_rows([written])):
            yield f"unit {unit}: its rejected rows differ from those of its file's manifest"

    def is_as_committed(self, file: UnitFile, *, sha256: str) -> bool:
        """Whether a unit's data file has the SHA-256 of its row in `.units`; true without one."""
        rows = self.recorded.get(file.unit, ())
        recorded = {row["sha256"] for row in rows if file.has_manifest(row["account"])}
        return not recorded or sha256 in recorded


def _by_unit(rows: Sequence[Mapping[str, Any]]) -> _Rows:
    by_unit = defaultdict[str, list[Mapping[str, Any]]](list)
    for row in rows:
        by_unit[row["unit"]].append(row)
    return by_unit


def _sorted(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    columns = ("unit", "id", "source", "reason", "detail")
    return sorted(tuple(str(row[name]) for name in columns) for row in rows)
