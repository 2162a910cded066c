"""Committing units of work: each exactly once, whoever is killed and however many run at a time.

What is committed can be replaced, unit by unit, by a file with fewer rows; old versions keep the old file.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import CommitProperties, DeltaTable, PostCommitHookProperties, Transaction, write_deltalake
from deltalake.exceptions import CommitFailedError, DeltaError
from deltalake.transaction import AddAction, RemoveAction

from pipelines.storage.objects import absolute_url, read_bytes, write_once
from pipelines.storage.retry import is_transient, sleep_with_jitter
from pipelines.tables.manifest import UnitManifest, read_manifest
from pipelines.tables.schemas import REJECTS, UNITS
from pipelines.tables.table import TableError, UnitFile, open_delta, open_table, unit_manifests

REWRITTEN_PREFIX = "restated-"
"""How the names of files begin that replace others in a sibling."""

_ROUND_TRANSACTION = "round"
_MAX_TRIES = 20
_RETRY_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class WrittenUnit:
    """A unit whose data file lies in its place, ready to be committed."""

    account: UnitManifest
    path: str
    size: int
    sha256: str
    seconds: float | None


Origin = Mapping[str, Any]
"""What committed a unit: recipe, its settings' hash, and the parents with their versions; plain JSON."""


def commit_units(
    url: str, files: Sequence[WrittenUnit], *, origin: Origin | None = None
) -> list[WrittenUnit]:
    """Commit units: their rejected rows, then their rows, then their accounts. Returns those that were new.

    Only the second of the three commits decides. Whoever stops between them, the next run puts right what is
    missing (`restore_manifests`).
    """
    location = absolute_url(url)
    _commit_rejects(f"{location}.rejects", files)
    fresh = _commit_rows(location, files)
    _commit_manifests(f"{location}.units", files, origin)
    return fresh


def commit_round(
    url: str, files: Sequence[WrittenUnit], *, number: int, origin: Origin | None = None
) -> bool:
    """Commit units that were made knowing all earlier ones: all in one commit, as round `number`, or none.

    False if another writer has committed this round; then what these units were made from is out of date.
    Rounds are numbered from 1. Whoever stops after the commit, the next run writes the accounts
    (`restore_manifests`).
    """
    location = absolute_url(url)
    delta = open_delta(location)
    if (delta.transaction_version(_ROUND_TRANSACTION) or 0) != number - 1:
        return False
    transactions = [
        Transaction(_ROUND_TRANSACTION, number),
        *(Transaction(_app_id(file), 1) for file in files),
    ]
    try:
        _commit_actions(
            delta, [_add_action(file) for file in files], CommitProperties(app_transactions=transactions)
        )
    except (DeltaError, OSError) as error:
        _raise_unless_retryable(error)
        return False
    _commit_manifests(f"{location}.units", files, origin)
    return True


def replace_units(url: str, files: Sequence[tuple[UnitFile, WrittenUnit]]) -> bool:
    """Put other data files into the place of committed ones; True if all of them now stand there.

    One commit takes away the old files and adds the new ones. It is made from a snapshot that has all the old
    ones, so what other writers add meanwhile stays. If one of the old files is replaced by another writer,
    nothing is committed: look again. Whoever stops before the siblings say the same, the next run puts it
    right (`restore_manifests`).
    """
    location = absolute_url(url)
    delta = open_delta(location)
    if not {_file_name(old.path) for old, _ in files} <= set(live_names(delta)):
        return False
    fresh = [new for _, new in files]
    removals = [_remove(_file_name(old.path)) for old, _ in files]
    try:
        _commit_actions(delta, [*removals, *map(_add_action, fresh)], _next_transactions(delta, fresh))
    except (DeltaError, OSError) as error:
        _raise_unless_retryable(error)
        return False
    _rewrite_siblings(location, fresh)
    return True


def restore_manifests(url: str) -> int:
    """Write the accounts (and rejected rows) of committed units whose siblings lack them; returns how many.

    That is where a unit was committed, or its file replaced, and its job was killed before it said so.
    """
    location = absolute_url(url)
    accounted = set(unit_manifests(url))
    lost = [file for file in open_table(url).units if file.unit not in accounted]
    for file in lost:
        if not file.mark:
            restored = read_written_unit(file.path)
            _commit_rejects(f"{location}.rejects", [restored])
            _commit_manifests(f"{location}.units", [restored], None)
    if replaced := [read_written_unit(file.path) for file in lost if file.mark]:
        _rewrite_siblings(location, replaced)
    return len(lost)


def read_written_unit(path: str, *, seconds: float | None = None) -> WrittenUnit:
    """A data file that lies in its place, read back: its account, size and hash.

    Raises:
        TableError: if it is not a file that a unit of work wrote.
    """
    data = read_bytes(path)
    try:
        account = read_manifest(data)
    except ValueError as error:
        raise TableError(
            f"{path} stands where a unit's data file belongs, but is {error}; remove it"
        ) from None
    sha256 = hashlib.sha256(data).hexdigest()
    return WrittenUnit(account=account, path=path, size=len(data), sha256=sha256, seconds=seconds)


def _commit_rejects(location: str, files: Sequence[WrittenUnit]) -> None:
    def rows(fresh: Sequence[WrittenUnit]) -> pa.Table:
        return pa.Table.from_pylist(_reject_rows(fresh), schema=REJECTS)

    _append_once(location, [file for file in files if file.account.rejections], rows)


def _commit_manifests(location: str, files: Sequence[WrittenUnit], origin: Origin | None) -> None:
    made_by = None if origin is None else json.dumps(origin, sort_keys=True)

    def rows(fresh: Sequence[WrittenUnit]) -> pa.Table:
        records = [{**_unit_row(file), "seconds": file.seconds, "made_by": made_by} for file in fresh]
        return pa.Table.from_pylist(records, schema=UNITS)

    _append_once(location, files, rows)


def _reject_rows(files: Sequence[WrittenUnit]) -> list[dict[str, Any]]:
    return [
        {
            "unit": file.account.unit,
            "id": rejection.id,
            "source": rejection.source,
            "reason": rejection.reason,
            "detail": rejection.detail,
        }
        for file in files
        for rejection in file.account.rejections
    ]


def _unit_row(file: WrittenUnit) -> dict[str, Any]:
    return {
        "unit": file.account.unit,
        "source": file.account.source,
        "account": file.account.to_json(),
        "rows_read": file.account.rows_read,
        "rows_written": file.account.rows_written,
        "rows_rejected": len(file.account.rejections),
        "bytes": file.size,
        "sha256": file.sha256,
    }


def _rewrite_siblings(location: str, files: Sequence[WrittenUnit]) -> None:
    """Bring both siblings to the accounts of these units. `units` comes last: its word is that both are."""

    def records(stated: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        # How long the unit took, and what made it, is known there alone.
        known = {row["unit"]: row for row in stated}
        unknown = dict.fromkeys(("seconds", "made_by"))
        return [{**unknown, **known.get(file.account.unit, {}), **_unit_row(file)} for file in files]

    _rewrite_rows(f"{location}.rejects", files, lambda _: _reject_rows(files), schema=REJECTS)
    _rewrite_rows(f"{location}.units", files, records, schema=UNITS)


_Restated = Callable[[Sequence[Mapping[str, Any]]], list[dict[str, Any]]]


def _rewrite_rows(
    location: str, files: Sequence[WrittenUnit], restated: _Restated, *, schema: pa.Schema
) -> None:
    """Replace what a sibling says of these units by what `restated` makes of it, in one commit."""
    units = {file.account.unit for file in files}
    for _ in range(_MAX_TRIES):
        delta = open_delta(location)
        held = {name: _read_rows(f"{location}/{name}") for name in live_names(delta)}
        told = {
            name: rows for name, rows in held.items() if not units.isdisjoint(row["unit"] for row in rows)
        }
        every = list(itertools.chain.from_iterable(told.values()))
        stated = [row for row in every if row["unit"] in units]
        wanted = restated(stated)
        if _in_order(stated) == _in_order(wanted):
            return
        others = [row for row in every if row["unit"] not in units]
        actions: list[AddAction | RemoveAction] = [_remove(name) for name in told]
        if others or wanted:
            actions.append(
                _write_sibling_file(location, pa.Table.from_pylist([*others, *wanted], schema=schema))
            )
        try:
            _commit_actions(delta, actions, _next_transactions(delta, files))
        except (DeltaError, OSError) as error:
            _raise_unless_retryable(error)
            continue
        return
    raise _too_many_conflicts(location)


def _read_rows(path: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(pa.BufferReader(read_bytes(path))).to_pylist()
    return rows


def _in_order(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return sorted(json.dumps(row, sort_keys=True) for row in rows)


def _write_sibling_file(location: str, rows: pa.Table) -> AddAction:
    """A data file of a sibling, named after its content, and without statistics: the log would keep them."""
    buffer = io.BytesIO()
    pq.write_table(rows, buffer, write_statistics=False)
    data = buffer.getvalue()
    name = f"{REWRITTEN_PREFIX}{hashlib.sha256(data).hexdigest()[:32]}.parquet"
    write_once(f"{location}/{name}", data)
    return _add(name, size=len(data), rows=rows.num_rows)


def _append_once(
    location: str, files: Sequence[WrittenUnit], rows: Callable[[Sequence[WrittenUnit]], pa.Table]
) -> None:
    def append(delta: DeltaTable, fresh: Sequence[WrittenUnit], properties: CommitProperties) -> None:
        write_deltalake(delta, rows(fresh), mode="append", commit_properties=properties)

    _commit_fresh(location, files, append)


def _commit_rows(location: str, files: Sequence[WrittenUnit]) -> list[WrittenUnit]:
    def append(delta: DeltaTable, fresh: Sequence[WrittenUnit], properties: CommitProperties) -> None:
        _commit_actions(delta, [_add_action(file) for file in fresh], properties)

    return _commit_fresh(location, files, append)


def _commit_actions(
    delta: DeltaTable, actions: Sequence[AddAction | RemoveAction], properties: CommitProperties
) -> None:
    delta.create_write_transaction(
        list(actions),
        mode="append",
        schema=delta.schema(),
        commit_properties=properties,
        post_commithook_properties=PostCommitHookProperties(cleanup_expired_logs=False),
    )


_Append = Callable[[DeltaTable, Sequence[WrittenUnit], CommitProperties], None]


def _commit_fresh(location: str, files: Sequence[WrittenUnit], append: _Append) -> list[WrittenUnit]:
    """Append what is not committed yet: looked up and committed on one and the same snapshot.

    A commit from a stale snapshot, when the same unit came in meanwhile, is refused by the log; then we
    look again.
    """
    for _ in range(_MAX_TRIES):
        delta = open_delta(location)
        fresh = [file for file in files if delta.transaction_version(_app_id(file)) is None]
        if not fresh:
            return []
        transactions = [Transaction(_app_id(file), 1) for file in fresh]
        try:
            append(delta, fresh, CommitProperties(app_transactions=transactions))
        except (DeltaError, OSError) as error:
            _raise_unless_retryable(error)
            continue
        return fresh
    raise _too_many_conflicts(location)


def _raise_unless_retryable(error: DeltaError | OSError) -> None:
    """After a commit that was refused, or of which the store did not say whether it came about.

    Raises:
        DeltaError: or OSError, the error itself if it is of another kind.
    """
    if isinstance(error, CommitFailedError):
        return
    if not is_transient(error):
        raise error
    sleep_with_jitter(_RETRY_SECONDS)


def _next_transactions(delta: DeltaTable, files: Sequence[WrittenUnit]) -> CommitProperties:
    """Count the units' transactions on: two writers that replace the same unit cannot both succeed."""
    counts = {_app_id(file): delta.transaction_version(_app_id(file)) or 0 for file in files}
    return CommitProperties(app_transactions=[Transaction(name, count + 1) for name, count in counts.items()])


def _too_many_conflicts(location: str) -> TableError:
    return TableError(f"{location}: {_MAX_TRIES} commits in a row were overtaken by other writers; run again")


def _app_id(file: WrittenUnit) -> str:
    return f"unit:{file.account.unit}"


def live_names(delta: DeltaTable) -> list[str]:
    """The files of a version, by their names in the table's folder."""
    names: list[str] = pa.table(delta.get_add_actions(flatten=True)).column("path").to_pylist()
    return names


def _add_action(file: WrittenUnit) -> AddAction:
    return _add(_file_name(file.path), size=file.size, rows=file.account.rows_written)


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
