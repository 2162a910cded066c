"""Repairs a table from its data files, each of which contains its unit's manifest.

Units that the log has lost are committed again, and rows of `.rejects` and `.units` that differ from the
manifests are written anew. A data file that was altered is left as it is: nothing else has its rows.
"""

from dataclasses import dataclass
from typing import Final

from pipelines.storage.objects import StorageError
from pipelines.tables.commits import WrittenUnit, read_written_unit, recommit_units, rewrite_siblings
from pipelines.tables.leases import write_lease
from pipelines.tables.table import Snapshot, TableError, open_table
from pipelines.tables.unit_files import UnitFile
from pipelines.tables.unit_states import UnitStates
from snapfusion.settings import digest

COMMITTED_IN_ROUNDS: Final = ("duplicates",)
"""Kinds of tables whose units are committed together, by the next round of their job, and never singly."""


@dataclass(frozen=True, kw_only=True)
class Repair:
    """The repairs of a table.

    Attributes:
        committed: units that were committed again.
        rewritten: units whose rows in `.rejects` or `.units` were written anew.
    """

    committed: tuple[str, ...]
    rewritten: tuple[str, ...]


def repair_table(table: Snapshot) -> Repair:
    """Repair what follows from the data files of `table`; what remains is found by verifying it."""
    with write_lease(table.url, purpose="a repair"):
        lost = _lost_units(table)
        recommit_units(table.url, lost)
        states = UnitStates.read(open_table(table.url))
        changed = [unit for file in states.table.units if (unit := _changed(states, file)) is not None]
        if changed:
            rewrite_siblings(table.url, changed)
    return Repair(
        committed=tuple(unit.manifest.unit for unit in lost),
        rewritten=tuple(unit.manifest.unit for unit in changed),
    )


def _lost_units(table: Snapshot) -> list[WrittenUnit]:
    """The units to commit again: as they were written, and by this table's settings."""
    if table.identity["kind"] in COMMITTED_IN_ROUNDS:
        return []
    units = []
    for lost in UnitStates.read(table).lost_units():
        unit = lost.file and _read(f"{table.url}/{lost.file}")
        if unit and unit.manifest.settings == digest(table.identity) and lost.sha256 in (None, unit.sha256):
            units.append(unit)
    return units


def _changed(states: UnitStates, file: UnitFile) -> WrittenUnit | None:
    """The unit of a file that is as it was committed, if its rows in the siblings are not."""
    unit = _read(file.path)
    if unit is None or not states.is_as_committed(file, sha256=unit.sha256) or states.is_replaced(file):
        return None
    return unit if any(states.sibling_faults(unit)) else None


def _read(path: str) -> WrittenUnit | None:
    try:
        return read_written_unit(path)
    except (TableError, StorageError):
        return None
