"""Committing units of work: each exactly once, whoever is killed and however many run at a time."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, PostCommitHookProperties, Transaction, write_deltalake
from deltalake.exceptions import CommitFailedError
from deltalake.transaction import AddAction, RemoveAction

from pipelines.account import Account, read_account
from pipelines.schemas import REJECTS, UNITS
from pipelines.storage import absolute, read_bytes
from pipelines.tables import TableError, accounts, open_table

_MAX_TRIES = 20


@dataclass(frozen=True, kw_only=True)
class Written:
    """A unit whose data file lies in its place, ready to be committed."""

    account: Account
    path: str
    size: int
    sha256: str
    seconds: float | None


Origin = Mapping[str, Any]
"""What committed a unit: recipe, its settings' hash, and the parents with their versions; plain JSON."""


def commit_units(url: str, files: Sequence[Written], *, origin: Origin | None = None) -> list[Written]:
    """Commit units: their rejected rows, then their rows, then their accounts. Returns those that were new.

    Only the second of the three commits decides. Whoever stops between them, the next run puts right what is
    missing (`restore_accounts`).
    """
    location = absolute(url)
    _commit_rejects(f"{location}.rejects", files)
    fresh = _commit_rows(location, files)
    _commit_accounts(f"{location}.units", files, origin)
    return fresh


def restore_accounts(url: str) -> int:
    """Write the accounts (and rejected rows) of units that were committed without them; returns how many."""
    location = absolute(url)
    accounted = set(accounts(url))
    lost = [file for file in open_table(url).units if file.unit not in accounted]
    for file in lost:
        restored = adopt(file.path)
        _commit_rejects(f"{location}.rejects", [restored])
        _commit_accounts(f"{location}.units", [restored], None)
    return len(lost)


def adopt(path: str, *, seconds: float | None = None) -> Written:
    """A data file that lies in its place, read back: its account, size and hash.

    Raises:
        TableError: if it is not a file that a unit of work wrote.
    """
    data = read_bytes(path)
    try:
        account = read_account(data)
    except ValueError as error:
        raise TableError(
            f"{path} stands where a unit's data file belongs, but is {error}; remove it"
        ) from None
    sha256 = hashlib.sha256(data).hexdigest()
    return Written(account=account, path=path, size=len(data), sha256=sha256, seconds=seconds)


def _commit_rejects(location: str, files: Sequence[Written]) -> None:
    def rows(fresh: Sequence[Written]) -> pa.Table:
        rejections = [
            {
                "unit": file.account.unit,
                "id": rejection.id,
                "source": rejection.source,
                "reason": rejection.reason,
                "detail": rejection.detail,
            }
            for file in fresh
            for rejection in file.account.rejections
        ]
        return pa.Table.from_pylist(rejections, schema=REJECTS)

    _append_once(location, [file for file in files if file.account.rejections], rows)


def _commit_accounts(location: str, files: Sequence[Written], origin: Origin | None) -> None:
    def rows(fresh: Sequence[Written]) -> pa.Table:
        records = [
            {
                "unit": file.account.unit,
                "source": file.account.source,
                "account": file.account.to_json(),
                "rows_read": file.account.rows_read,
                "rows_written": file.account.rows_written,
                "rows_rejected": len(file.account.rejections),
                "bytes": file.size,
                "sha256": file.sha256,
                "seconds": file.seconds,
                "made_by": None if origin is None else json.dumps(origin, sort_keys=True),
            }
            for file in fresh
        ]
        return pa.Table.from_pylist(records, schema=UNITS)

    _append_once(location, files, rows)


def _append_once(
    location: str, files: Sequence[Written], rows: Callable[[Sequence[Written]], pa.Table]
) -> None:
    def append(delta: DeltaTable, fresh: Sequence[Written], properties: CommitProperties) -> None:
        write_deltalake(delta, rows(fresh), mode="append", commit_properties=properties)

    _commit_fresh(location, files, append)


def _commit_rows(location: str, files: Sequence[Written]) -> list[Written]:
    def append(delta: DeltaTable, fresh: Sequence[Written], properties: CommitProperties) -> None:
        actions: list[AddAction | RemoveAction] = [_add_action(file) for file in fresh]
        delta.create_write_transaction(
            actions,
            mode="append",
            schema=delta.schema(),
            commit_properties=properties,
            post_commithook_properties=PostCommitHookProperties(cleanup_expired_logs=False),
        )

    return _commit_fresh(location, files, append)


_Append = Callable[[DeltaTable, Sequence[Written], CommitProperties], None]


def _commit_fresh(location: str, files: Sequence[Written], append: _Append) -> list[Written]:
    """Append what is not committed yet: looked up and committed on one and the same snapshot.

    A commit from a stale snapshot, when the same unit came in meanwhile, is refused by the log; then we
    look again.
    """
    for _ in range(_MAX_TRIES):
        delta = DeltaTable(location)
        fresh = [file for file in files if delta.transaction_version(_app_id(file)) is None]
        if not fresh:
            return []
        transactions = [Transaction(_app_id(file), 1) for file in fresh]
        try:
            append(delta, fresh, CommitProperties(app_transactions=transactions))
        except CommitFailedError:
            continue
        return fresh
    raise TableError(f"{location}: {_MAX_TRIES} commits in a row were overtaken by other writers; run again")


def _app_id(file: Written) -> str:
    return f"unit:{file.account.unit}"


def _add_action(file: Written) -> AddAction:
    stats = json.dumps({"numRecords": file.account.rows_written})
    name = file.path.rsplit("/", 1)[1]
    return AddAction(
        path=name,
        size=file.size,
        partition_values={},
        modification_time=int(time.time() * 1000),
        data_change=True,
        stats=stats,
    )
