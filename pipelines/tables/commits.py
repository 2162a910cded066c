"""Commits units of work, each exactly once, whoever is killed and however many processes run at a time.

Committed units can be replaced by files with fewer rows; old versions keep the old files.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import pyarrow as pa
from deltalake import DeltaTable, Transaction
from deltalake.transaction import AddAction

from pipelines.storage.objects import read_bytes, write_once
from pipelines.tables.manifest import UnitManifest, read_manifest, to_parquet
from pipelines.tables.network_time import UnitSpan
from pipelines.tables.open_log import OpenLog, TableLogs
from pipelines.tables.row_keys import RowKeys
from pipelines.tables.schemas import REJECTS, UNITS
from pipelines.tables.table import (
    Snapshot,
    TableError,
    live_names,
    open_delta,
    open_table,
    read_sibling_files,
)
from pipelines.tables.transactions import (
    Action,
    add_file,
    add_rows,
    first_transactions,
    next_transactions,
    remove_file,
    try_commit,
)
from pipelines.tables.unit_files import UnitFile, unit_of

REWRITTEN_PREFIX = "restated-"
"""Prefix of the names of files that replace others in `.units` and `.rejects`; it is on disk and stays."""

_APPENDED_PREFIX = "part-"
_ROUND_TRANSACTION = "round"
_MAX_TRIES = 20

_Rows = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class WrittenUnit:
    """A unit whose data file is written, ready to be committed.

    `row_keys` is None in a table that no training reads, `span` where no network computed in this job.
    """

    manifest: UnitManifest
    path: str
    size: int
    sha256: str
    seconds: float | None
    row_keys: RowKeys | None
    span: UnitSpan | None = None


Origin = Mapping[str, Any]
"""Provenance of a unit: recipe, digest of its settings, and the parents with their versions; plain JSON."""


def commit_units(
    url: str, units: Sequence[WrittenUnit], *, origin: Origin | None = None, logs: TableLogs | None = None
) -> None:
    """Commit those of the units that are not committed: their rejected rows, then rows, then manifests.

    Only the second commit decides. Rejected rows come before it, so that a committed unit never lacks them;
    readers ignore those of a unit that is not committed. Manifests come after it, because whoever finds one
    takes the unit for done. If the process is killed in between, the next run adds what is missing
    (`restore_manifests`).

    Args:
        url: of the table.
        units: to commit.
        origin: their provenance.
        logs: of the table, if they are open already; opening them costs more the longer they are.
    """
    logs = logs or TableLogs.of(url)
    _commit_rejects(logs.rejects, units)
    _commit_rows(logs.main, units)
    _commit_manifests(logs.units, units, origin)


def commit_round(
    url: str, units: Sequence[WrittenUnit], *, number: int, origin: Origin | None = None
) -> bool:
    """Commit units that depend on all earlier ones: all of them in one commit, as round `number`, or none.

    False if another writer has committed this round; the units were then made from outdated rows. Rounds
    count from 1. If the process is killed after the commit, the next run writes the manifests
    (`restore_manifests`).
    """
    delta = open_delta(url)
    if (delta.transaction_version(_ROUND_TRANSACTION) or 0) != number - 1:
        return False
    transactions = [Transaction(_ROUND_TRANSACTION, number), *first_transactions(_names(units))]
    if not try_commit(delta, url, [_add_unit(unit) for unit in units], transactions):
        return False
    _commit_manifests(OpenLog(f"{url}.units"), units, origin)
    return True


def replace_units(url: str, units: Sequence[tuple[UnitFile, WrittenUnit]]) -> bool:
    """Replace committed data files by others; True if all of the new ones are committed.

    One commit removes the old files and adds the new ones. It is made on a snapshot that has all the old
    ones, so units that other writers add meanwhile stay. If another writer has replaced one of the old files,
    nothing is committed, and the caller must read the table again. If the process is killed before `.units`
    and `.rejects` are rewritten, the next run does it (`restore_manifests`).
    """
    delta = open_delta(url)
    if not {_file_name(old.path) for old, _ in units} <= set(live_names(delta)):
        return False
    new = [unit for _, unit in units]
    actions: list[Action] = [*(remove_file(_file_name(old.path)) for old, _ in units), *map(_add_unit, new)]
    # In one commit, so no version lacks a unit or has it twice.
    if not try_commit(delta, url, actions, next_transactions(delta, _names(new))):
        return False
    rewrite_siblings(url, new)
    return True


def recommit_units(url: str, units: Sequence[WrittenUnit]) -> None:
    """Commit the rows of units that were committed before, and that the log has lost since."""
    for delta in _snapshots(url) if units else ():
        committed = {unit_of(name) for name in live_names(delta)}
        new = [unit for unit in units if unit.manifest.unit not in committed]
        transactions = next_transactions(delta, _names(new))
        if not new or try_commit(delta, url, [_add_unit(unit) for unit in new], transactions):
            return


def restore_manifests(table: Snapshot) -> Snapshot:
    """Write manifests and rejected rows of committed units that lack them; returns the table afterwards.

    They are missing where a process was killed after it had committed a unit or replaced its file.
    """
    # Rows of earlier versions do not name their file; whether they are of it their manifests tell.
    if not table.recorded(["unit"])["unit"].null_count:
        return table
    complete = {record.unit for record in table.unit_records()}
    missing = [file for file in table.units if file.unit not in complete]
    if not missing:
        return table
    # The origin is lost: it is in no data file.
    logs = TableLogs.of(table.url)
    for file in missing:
        if not file.revision:
            restored = [read_written_unit(file.path)]
            _commit_rejects(logs.rejects, restored)
            _commit_manifests(logs.units, restored, None)
    # A replaced unit has been appended once already: its rows are rewritten instead.
    if replaced := [read_written_unit(file.path) for file in missing if file.revision]:
        rewrite_siblings(table.url, replaced)
    return open_table(table.url)


def write_unit(
    rows: pa.Table, manifest: UnitManifest, *, path: str, seconds: float | None = None
) -> WrittenUnit:
    """Write a unit's data file; if it exists already, it is read back and stays as it is."""
    data = to_parquet(rows, manifest)
    if not write_once(path, data):
        return read_written_unit(path, seconds=seconds)
    return written_unit(path, data, manifest, row_keys=RowKeys.of_rows(rows), seconds=seconds)


def read_written_unit(path: str, *, seconds: float | None = None) -> WrittenUnit:
    """A written unit, read back from its data file.

    Raises:
        TableError: if no unit of work wrote this file.
    """
    data = read_bytes(path)
    try:
        manifest = read_manifest(data)
    except ValueError as error:
        raise TableError(f"{path} has the name of a unit's data file, but is {error}; remove it") from None
    return written_unit(path, data, manifest, row_keys=RowKeys.of_file(data), seconds=seconds)


def written_unit(
    path: str,
    data: bytes,
    manifest: UnitManifest,
    *,
    row_keys: RowKeys | None,
    seconds: float | None = None,
) -> WrittenUnit:
    """The unit whose data file has this content."""
    sha256 = hashlib.sha256(data).hexdigest()
    return WrittenUnit(
        manifest=manifest,
        path=path,
        size=len(data),
        sha256=sha256,
        seconds=seconds,
        row_keys=row_keys,
    )


def _commit_rejects(log: OpenLog, units: Sequence[WrittenUnit]) -> None:
    rejecting = [unit for unit in units if unit.manifest.rejections]
    _commit_new(
        log,
        rejecting,
        lambda new: [
            add_rows(
                log.location, pa.Table.from_pylist(reject_rows(new), schema=REJECTS), prefix=_APPENDED_PREFIX
            )
        ],
    )


def _commit_rows(log: OpenLog, units: Sequence[WrittenUnit]) -> None:
    _commit_new(log, units, lambda new: [_add_unit(unit) for unit in new])


def _commit_manifests(log: OpenLog, units: Sequence[WrittenUnit], origin: Origin | None) -> None:
    made_by = None if origin is None else json.dumps(origin, sort_keys=True)

    def actions(new: Sequence[WrittenUnit]) -> list[Action]:
        rows = [{**unit_row(unit), "seconds": unit.seconds, "made_by": made_by} for unit in new]
        return [add_rows(log.location, pa.Table.from_pylist(rows, schema=UNITS), prefix=_APPENDED_PREFIX)]

    _commit_new(log, units, actions)


def reject_rows(units: Sequence[WrittenUnit]) -> _Rows:
    """The rows of `.rejects` that follow from units' data files, each with its ordinal."""
    return [
        {"unit": unit.manifest.unit, **asdict(rejection)}
        for unit in units
        for rejection in unit.manifest.rejections
    ]


def unit_row(unit: WrittenUnit) -> dict[str, Any]:
    """The row of `.units` that follows from a unit's data file."""
    return {
        "unit": unit.manifest.unit,
        "source": unit.manifest.source,
        "account": unit.manifest.to_json(),  # the column has the name of version 0.1
        "rows_read": unit.manifest.rows_read,
        "rows_written": unit.manifest.rows_written,
        "rows_rejected": len(unit.manifest.rejections),
        "bytes": unit.size,
        "sha256": unit.sha256,
        "file": _file_name(unit.path),
        "held_out_keys": unit.row_keys and unit.row_keys.keys,
        "shapes": unit.row_keys and unit.row_keys.shapes,
    }


def rewrite_siblings(url: str, units: Sequence[WrittenUnit]) -> None:
    """Bring `.rejects` and `.units` to the manifests of these units.

    `.units` comes last: a manifest there tells `restore_manifests` that both are up to date.
    """

    def rows(old_rows: _Rows) -> _Rows:
        # The seconds and the origin of a unit are in no data file, so they are taken over.
        old = {row["unit"]: row for row in old_rows}
        return [{**old.get(unit.manifest.unit, {}), **unit_row(unit)} for unit in units]

    _rewrite_rows(f"{url}.rejects", units, lambda _: reject_rows(units), schema=REJECTS)
    _rewrite_rows(f"{url}.units", units, rows, schema=UNITS)


def _rewrite_rows(
    location: str, units: Sequence[WrittenUnit], rows: Callable[[_Rows], _Rows], *, schema: pa.Schema
) -> None:
    """Replace the rows of these units in a sibling by `rows(old_rows)`, in one commit.

    Files hold rows of several units and are never edited: those that hold a row of these units are removed,
    and one new file gets the new rows and all other rows of the removed files.
    """
    names = set(_names(units))
    for delta in _snapshots(location):
        contents = {name: read_sibling_files(location, [name]).to_pylist() for name in live_names(delta)}
        affected = {
            name: rows for name, rows in contents.items() if not names.isdisjoint(row["unit"] for row in rows)
        }
        affected_rows = list(itertools.chain.from_iterable(affected.values()))
        old_rows = [row for row in affected_rows if row["unit"] in names]
        new_rows = pa.Table.from_pylist(rows(old_rows), schema=schema).to_pylist()
        # Another process, or an earlier run that was killed later on, has done it already.
        if _canonical(old_rows) == _canonical(new_rows):
            return
        others = [row for row in affected_rows if row["unit"] not in names]
        actions: list[Action] = [remove_file(name) for name in affected]
        if others or new_rows:
            all_rows = [*others, *new_rows]
            actions.append(
                add_rows(location, pa.Table.from_pylist(all_rows, schema=schema), prefix=REWRITTEN_PREFIX)
            )
        # Appends by others between this snapshot and the commit are no conflict: they stay.
        if try_commit(delta, location, actions, next_transactions(delta, names)):
            return


def _canonical(rows: _Rows) -> list[str]:
    return sorted(json.dumps(row, sort_keys=True, default=bytes.hex) for row in rows)


def _commit_new(
    log: OpenLog,
    units: Sequence[WrittenUnit],
    actions: Callable[[Sequence[WrittenUnit]], list[Action]],
) -> None:
    """Commit `actions(new)` of the units that are not committed yet.

    Each unit is a Delta transaction of its own name. They are looked up in the very snapshot that the commit
    is made on: if another writer has committed one of them since, the log refuses the commit as a conflict,
    and the lookup is repeated on a new snapshot. So no unit is ever committed twice.
    """
    for delta in _newest(log) if units else ():
        new = [unit for unit in units if not log.has(unit.manifest.unit)]
        if not new or try_commit(delta, log.location, actions(new), first_transactions(_names(new))):
            return


def _snapshots(location: str) -> Iterator[DeltaTable]:
    """The newest version of a table, opened again after each failed commit."""
    return _retried(location, partial(open_delta, location))


def _newest(log: OpenLog) -> Iterator[DeltaTable]:
    """The newest version of a table, whose log is followed, again after each failed commit."""
    return _retried(log.location, log.newest)


def _retried(location: str, newest: Callable[[], DeltaTable]) -> Iterator[DeltaTable]:
    """Versions for one try of a commit each.

    Raises:
        TableError: after too many of them.
    """
    for _ in range(_MAX_TRIES):
        yield newest()
    raise TableError(f"{location}: {_MAX_TRIES} commits failed, by other writers or the store; run again")


def _add_unit(unit: WrittenUnit) -> AddAction:
    return add_file(_file_name(unit.path), size=unit.size, rows=unit.manifest.rows_written)


def _names(units: Sequence[WrittenUnit]) -> list[str]:
    return [unit.manifest.unit for unit in units]


def _file_name(path: str) -> str:
    return path.rpartition("/")[2]
