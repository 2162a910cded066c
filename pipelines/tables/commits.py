"""Commits units of work, each exactly once, whoever is killed and however many processes run at a time.

Committed units can be replaced by files with fewer rows; old versions keep the old files.
"""

import hashlib
import io
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import CommitProperties, DeltaTable, PostCommitHookProperties, Transaction, write_deltalake
from deltalake.exceptions import CommitFailedError, DeltaError
from deltalake.transaction import AddAction, RemoveAction

from pipelines.storage.objects import read_bytes, write_once
from pipelines.storage.retry import is_transient, sleep_with_jitter
from pipelines.tables.manifest import UnitManifest, read_manifest, to_parquet
from pipelines.tables.schemas import REJECTS, UNITS
from pipelines.tables.table import Snapshot, TableError, UnitFile, open_delta, open_table

REWRITTEN_PREFIX = "restated-"
"""Prefix of the names of files that replace others in `.units` and `.rejects`; it is on disk and stays."""

_ROUND_TRANSACTION = "round"
_MAX_TRIES = 20
_RETRY_SECONDS = 1.0

Action = AddAction | RemoveAction
_Rows = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class WrittenUnit:
    """A unit whose data file is written, ready to be committed."""

    manifest: UnitManifest
    path: str
    size: int
    sha256: str
    seconds: float | None


Origin = Mapping[str, Any]
"""Provenance of a unit: recipe, digest of its settings, and the parents with their versions; plain JSON."""


def commit_units(url: str, units: Sequence[WrittenUnit], *, origin: Origin | None = None) -> None:
    """Commit those of the units that are not committed: their rejected rows, then rows, then manifests.

    Only the second commit decides. Rejected rows come before it, so that a committed unit never lacks them;
    readers ignore those of a unit that is not committed. Manifests come after it, because whoever finds one
    takes the unit for done. If the process is killed in between, the next run adds what is missing
    (`restore_manifests`).
    """
    _commit_rejects(f"{url}.rejects", units)
    _commit_rows(url, units)
    _commit_manifests(f"{url}.units", units, origin)


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
    transactions = [Transaction(_ROUND_TRANSACTION, number), *_first_transactions(units)]
    if not _try_commit(delta, [_add_unit(unit) for unit in units], transactions):
        return False
    _commit_manifests(f"{url}.units", units, origin)
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
    removals = [_remove(_file_name(old.path)) for old, _ in units]
    # In one commit, so no version lacks a unit or has it twice.
    if not _try_commit(delta, [*removals, *map(_add_unit, new)], _next_transactions(delta, new)):
        return False
    _rewrite_siblings(url, new)
    return True


def restore_manifests(table: Snapshot) -> Snapshot:
    """Write manifests and rejected rows of committed units that lack them; returns the table afterwards.

    They are missing where a process was killed after it had committed a unit or replaced its file.
    """
    complete = {record.unit for record in table.unit_records()}
    missing = [file for file in table.units if file.unit not in complete]
    if not missing:
        return table
    # The origin is lost: it is in no data file.
    for file in missing:
        if not file.revision:
            restored = [read_written_unit(file.path)]
            _commit_rejects(f"{table.url}.rejects", restored)
            _commit_manifests(f"{table.url}.units", restored, None)
    # A replaced unit has been appended once already: its rows are rewritten instead.
    if replaced := [read_written_unit(file.path) for file in missing if file.revision]:
        _rewrite_siblings(table.url, replaced)
    return open_table(table.url)


def write_unit(
    rows: pa.Table, manifest: UnitManifest, *, path: str, seconds: float | None = None
) -> WrittenUnit:
    """Write a unit's data file; if it exists already, it is read back and stays as it is."""
    data = to_parquet(rows, manifest)
    if not write_once(path, data):
        return read_written_unit(path, seconds=seconds)
    return _written_unit(path, data, manifest, seconds=seconds)


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
    return _written_unit(path, data, manifest, seconds=seconds)


def _written_unit(path: str, data: bytes, manifest: UnitManifest, *, seconds: float | None) -> WrittenUnit:
    sha256 = hashlib.sha256(data).hexdigest()
    return WrittenUnit(manifest=manifest, path=path, size=len(data), sha256=sha256, seconds=seconds)


def _commit_rejects(location: str, units: Sequence[WrittenUnit]) -> None:
    rejecting = [unit for unit in units if unit.manifest.rejections]
    _commit_new(location, rejecting, lambda new: pa.Table.from_pylist(_reject_rows(new), schema=REJECTS))


def _commit_rows(location: str, units: Sequence[WrittenUnit]) -> None:
    _commit_new(location, units, lambda new: [_add_unit(unit) for unit in new])


def _commit_manifests(location: str, units: Sequence[WrittenUnit], origin: Origin | None) -> None:
    made_by = None if origin is None else json.dumps(origin, sort_keys=True)

    def table(new: Sequence[WrittenUnit]) -> pa.Table:
        rows = [{**_unit_row(unit), "seconds": unit.seconds, "made_by": made_by} for unit in new]
        return pa.Table.from_pylist(rows, schema=UNITS)

    _commit_new(location, units, table)


def _reject_rows(units: Sequence[WrittenUnit]) -> _Rows:
    return [
        {"unit": unit.manifest.unit, **asdict(rejection)}
        for unit in units
        for rejection in unit.manifest.rejections
    ]


def _unit_row(unit: WrittenUnit) -> dict[str, Any]:
    return {
        "unit": unit.manifest.unit,
        "source": unit.manifest.source,
        "account": unit.manifest.to_json(),  # the column has the name of version 0.1
        "rows_read": unit.manifest.rows_read,
        "rows_written": unit.manifest.rows_written,
        "rows_rejected": len(unit.manifest.rejections),
        "bytes": unit.size,
        "sha256": unit.sha256,
    }


def _rewrite_siblings(url: str, units: Sequence[WrittenUnit]) -> None:
    """Bring `.rejects` and `.units` to the manifests of these units.

    `.units` comes last: a manifest there tells `restore_manifests` that both are up to date.
    """

    def rows(old_rows: _Rows) -> _Rows:
        # The seconds and the origin of a unit are in no data file, so they are taken over.
        old = {row["unit"]: row for row in old_rows}
        return [{**old.get(unit.manifest.unit, {}), **_unit_row(unit)} for unit in units]

    _rewrite_rows(f"{url}.rejects", units, lambda _: _reject_rows(units), schema=REJECTS)
    _rewrite_rows(f"{url}.units", units, rows, schema=UNITS)


def _rewrite_rows(
    location: str, units: Sequence[WrittenUnit], rows: Callable[[_Rows], _Rows], *, schema: pa.Schema
) -> None:
    """Replace the rows of these units in a sibling by `rows(old_rows)`, in one commit.

    Files hold rows of several units and are never edited: those that hold a row of these units are removed,
    and one new file gets the new rows and all other rows of the removed files.
    """
    names = {unit.manifest.unit for unit in units}
    for delta in _snapshots(location):
        contents = {
            name: pq.read_table(pa.BufferReader(read_bytes(f"{location}/{name}"))).to_pylist()
            for name in live_names(delta)
        }
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
        actions: list[Action] = [_remove(name) for name in affected]
        if others or new_rows:
            table = pa.Table.from_pylist([*others, *new_rows], schema=schema)
            actions.append(_write_sibling_file(location, table))
        # Appends by others between this snapshot and the commit are no conflict: they stay.
        if _try_commit(delta, actions, _next_transactions(delta, units)):
            return


def _canonical(rows: _Rows) -> list[str]:
    return sorted(json.dumps(row, sort_keys=True) for row in rows)


def _write_sibling_file(location: str, rows: pa.Table) -> AddAction:
    """Write a data file of a sibling without statistics: the log would keep them."""
    buffer = io.BytesIO()
    pq.write_table(rows, buffer, write_statistics=False)
    data = buffer.getvalue()
    # Named by its content: a second try of the same rewrite finds the file it wrote before.
    name = f"{REWRITTEN_PREFIX}{hashlib.sha256(data).hexdigest()[:32]}.parquet"
    write_once(f"{location}/{name}", data)
    return _add(name, size=len(data), rows=rows.num_rows)


def _commit_new(
    location: str,
    units: Sequence[WrittenUnit],
    data: Callable[[Sequence[WrittenUnit]], list[Action] | pa.Table],
) -> None:
    """Append `data(new)` of the units that are not committed yet.

    Each unit is a Delta transaction of its own name. They are looked up in the very snapshot that the commit
    is made on: if another writer has committed one of them since, the log refuses the commit as a conflict,
    and the lookup is repeated on a new snapshot. So no unit is ever committed twice.
    """
    for delta in _snapshots(location) if units else ():
        new = [unit for unit in units if delta.transaction_version(_app_id(unit)) is None]
        if not new or _try_commit(delta, data(new), _first_transactions(new)):
            return


def _snapshots(location: str) -> Iterator[DeltaTable]:
    """The newest version of a table, opened again after each failed commit.

    Raises:
        TableError: after too many of them.
    """
    for _ in range(_MAX_TRIES):
        yield open_delta(location)
    raise TableError(f"{location}: {_MAX_TRIES} commits failed, by other writers or the store; run again")


def _first_transactions(units: Sequence[WrittenUnit]) -> list[Transaction]:
    # Not by `_next_transactions`: each look-up of a version reads the log from the store again.
    return [Transaction(_app_id(unit), 1) for unit in units]


def _next_transactions(delta: DeltaTable, units: Sequence[WrittenUnit]) -> list[Transaction]:
    """The units' transactions with their versions raised by one.

    Two writers that replace the same unit write the same transaction, so the log refuses the second.
    """
    versions = {_app_id(unit): delta.transaction_version(_app_id(unit)) or 0 for unit in units}
    return [Transaction(name, version + 1) for name, version in versions.items()]


def _try_commit(delta: DeltaTable, data: list[Action] | pa.Table, transactions: list[Transaction]) -> bool:
    """Commit files or rows on this snapshot; False if that was refused as a conflict, or the store failed.

    A commit whose response was lost may have succeeded. It is safe to repeat all the same: the next snapshot
    shows its transactions.
    """
    properties = CommitProperties(app_transactions=transactions)
    try:
        if isinstance(data, pa.Table):
            write_deltalake(delta, data, mode="append", commit_properties=properties)
        else:
            delta.create_write_transaction(
                data,
                mode="append",
                schema=delta.schema(),
                commit_properties=properties,
                # The log is the record of what is committed: no commit may clean it up.
                post_commithook_properties=PostCommitHookProperties(cleanup_expired_logs=False),
            )
    except CommitFailedError:
        return False
    except (DeltaError, OSError) as error:
        if not is_transient(error):
            raise
        sleep_with_jitter(_RETRY_SECONDS)
        return False
    return True


def _app_id(unit: WrittenUnit) -> str:
    return f"unit:{unit.manifest.unit}"


def live_names(delta: DeltaTable) -> list[str]:
    """The names of a version's data files in the table's folder."""
    names: list[str] = pa.table(delta.get_add_actions(flatten=True)).column("path").to_pylist()
    return names


def _add_unit(unit: WrittenUnit) -> AddAction:
    return _add(_file_name(unit.path), size=unit.size, rows=unit.manifest.rows_written)


def _add(name: str, *, size: int, rows: int) -> AddAction:
    return AddAction(
        path=name,
        size=size,
        partition_values={},
        modification_time=_now_ms(),
        data_change=True,
        stats=json.dumps({"numRecords": rows}),
    )


def _remove(name: str) -> RemoveAction:
    return RemoveAction(path=name, data_change=True, deletion_timestamp=_now_ms())


def _file_name(path: str) -> str:
    return path.rpartition("/")[2]


def _now_ms() -> int:
    return int(time.time() * 1000)
