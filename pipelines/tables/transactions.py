"""Commits files to a Delta log under transactions, each of which the log accepts once.

deltalake writes a log entry beside its place and links it there, without fsync. So the entry and its folder
are synced here, right after the commit; the data files and their folders were synced before it.
"""

import hashlib
import io
import json
import time
from collections.abc import Iterable, Sequence

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import CommitProperties, DeltaTable, PostCommitHookProperties, Transaction
from deltalake.exceptions import CommitFailedError, DeltaError
from deltalake.transaction import AddAction, RemoveAction

from pipelines.storage.durability import sync
from pipelines.storage.faults import plain_text
from pipelines.storage.objects import is_local, local_path, write_once
from pipelines.storage.retry import StoreFailure, is_transient, sleep_with_jitter

Action = AddAction | RemoveAction

_RETRY_SECONDS = 1.0


def first_transactions(units: Iterable[str]) -> list[Transaction]:
    """The transactions of units that are committed for the first time."""
    # Not by `next_transactions`: each look-up of a version reads the log from the store again.
    return [Transaction(app_id(unit), 1) for unit in units]


def next_transactions(delta: DeltaTable, units: Iterable[str]) -> list[Transaction]:
    """The units' transactions with their versions raised by one.

    Two writers that replace the same unit write the same transaction, so the log refuses the second.
    """
    versions = {app_id(unit): delta.transaction_version(app_id(unit)) or 0 for unit in units}
    return [Transaction(name, version + 1) for name, version in versions.items()]


def app_id(unit: str) -> str:
    """The name of a unit's transactions."""
    return f"unit:{unit}"


def try_commit(
    delta: DeltaTable, location: str, actions: Sequence[Action], transactions: list[Transaction]
) -> bool:
    """Commit to the table at `location`, on this snapshot of it.

    False if that was refused as a conflict, or the store failed. A commit whose response was lost may have
    succeeded. It is safe to repeat all the same: the next snapshot shows its transactions.
    """
    try:
        delta.create_write_transaction(
            list(actions),
            mode="append",
            schema=delta.schema(),
            commit_properties=CommitProperties(app_transactions=transactions),
            # The log is the record of what is committed: no commit may clean it up.
            post_commithook_properties=PostCommitHookProperties(cleanup_expired_logs=False),
        )
    except CommitFailedError:
        return False
    except (DeltaError, OSError) as error:
        if not is_transient(error):
            raise StoreFailure(f"{location} cannot be written: {plain_text(error)}") from error
        sleep_with_jitter(_RETRY_SECONDS)
        return False
    sync_log(location, after=delta.version())
    return True


def sync_log(location: str, *, after: int) -> None:
    """Sync the entries of a local log that come after version `after`, and then their folder."""
    if not is_local(location):
        return
    log = local_path(location) / "_delta_log"
    version = after + 1
    # Other writers may have committed before this one: their entries are synced, too.
    while (entry := log / f"{version:020d}.json").exists():
        sync(entry)
        version += 1
    sync(log)


def add_file(name: str, *, size: int, rows: int) -> AddAction:
    """The addition of a data file in the table's folder."""
    return AddAction(
        path=name,
        size=size,
        partition_values={},
        modification_time=_now_ms(),
        data_change=True,
        stats=json.dumps({"numRecords": rows}),
    )


def add_rows(location: str, rows: pa.Table, *, prefix: str, compression: str = "snappy") -> AddAction:
    """Write a data file of a sibling, and its addition; without statistics, which the log would keep."""
    buffer = io.BytesIO()
    pq.write_table(rows, buffer, write_statistics=False, write_page_checksum=True, compression=compression)
    data = buffer.getvalue()
    # Named by its content: a second try of the same commit finds the file it wrote before.
    name = f"{prefix}{hashlib.sha256(data).hexdigest()[:32]}.parquet"
    write_once(f"{location}/{name}", data)
    return add_file(name, size=len(data), rows=rows.num_rows)


def remove_file(name: str) -> RemoveAction:
    """The removal of a data file in the table's folder."""
    return RemoveAction(path=name, data_change=True, deletion_timestamp=_now_ms())


def _now_ms() -> int:
    return int(time.time() * 1000)
