"""Logs that stay open: opening one replays it, following it reads the entries that were added since."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError

from pipelines.storage.objects import IO_THREADS, StorageError, read_bytes
from pipelines.storage.retry import with_retries
from pipelines.tables.table import Snapshot, open_delta
from pipelines.tables.transactions import app_id


class OpenLog:
    """The log of one table, for a process that commits to it many times.

    Args:
        location: URL of the table.
    """

    def __init__(self, location: str) -> None:
        self.location = location
        self._delta: DeltaTable | None = None
        self._transactions: _Transactions | None = None

    def newest(self) -> DeltaTable:
        """The table at its newest version.

        Raises:
            TableError: if it cannot be opened.
        """
        if self._delta is not None:
            before, delta = self._delta.version(), self._delta
            try:
                with_retries(self.location, delta.update_incremental)
                if self._transactions is not None:
                    for version in range(before + 1, delta.version() + 1):
                        self._transactions.add(_entry_app_ids(self.location, version))
                return delta
            except (DeltaError, StorageError):
                # Entries were removed meanwhile, as those of siblings are after a deletion request.
                self._transactions = None
        self._delta = open_delta(self.location)
        return self._delta

    def has(self, unit: str) -> bool:
        """Whether the version that `newest` returned last has a transaction of this unit."""
        delta, name = self._delta or self.newest(), app_id(unit)
        if self._transactions is None:
            self._transactions = _Transactions(_all_app_ids(self.location, version=delta.version()))
        # Few units are looked up in the log itself, which deltalake reads again for each.
        return self._transactions.may_have(name) and delta.transaction_version(name) is not None


@dataclass(frozen=True, kw_only=True)
class TableLogs:
    """The logs of a table and its siblings."""

    main: OpenLog
    rejects: OpenLog
    units: OpenLog

    @classmethod
    def of(cls, url: str) -> TableLogs:
        """Those of the table at `url`, each of which is opened when it is first used."""
        return cls(main=OpenLog(url), rejects=OpenLog(f"{url}.rejects"), units=OpenLog(f"{url}.units"))

    def newest_table(self) -> Snapshot:
        """The table at its newest version."""
        return Snapshot(self.main.location, self.main.newest())


class _Transactions:
    """The names of a log's transactions, of which eight bytes each are kept."""

    def __init__(self, names: Iterable[str]) -> None:
        self._hashes = np.sort(np.fromiter(map(hash, names), np.int64))
        self._added: set[int] = set()

    def add(self, names: Iterable[str]) -> None:
        self._added.update(map(hash, names))

    def may_have(self, name: str) -> bool:
        """Whether the log has this name, or perhaps another of the same hash."""
        key = hash(name)
        index = int(np.searchsorted(self._hashes, key))
        return key in self._added or (index < len(self._hashes) and int(self._hashes[index]) == key)


def _all_app_ids(location: str, *, version: int) -> list[str]:
    """The names of all transactions up to a version: those of the last checkpoint, and of later entries."""
    log, checkpoint = f"{location}/_delta_log", -1
    names: list[str] = []
    with suppress(StorageError):
        checkpoint = json.loads(read_bytes(f"{log}/_last_checkpoint"))["version"]
    if checkpoint >= 0:
        data = pa.BufferReader(read_bytes(f"{log}/{checkpoint:020d}.checkpoint.parquet"))
        transactions = pq.read_table(data, columns=["txn"])["txn"].combine_chunks()
        names = transactions.field("appId").drop_null().to_pylist()
    with ThreadPoolExecutor(IO_THREADS) as readers:
        later = readers.map(partial(_entry_app_ids, location), range(checkpoint + 1, version + 1))
        return [*names, *itertools.chain.from_iterable(later)]


def _entry_app_ids(location: str, version: int) -> list[str]:
    """The names of the transactions of one log entry.

    Raises:
        StorageError: if there is no such entry.
    """
    lines = read_bytes(f"{location}/_delta_log/{version:020d}.json").splitlines()
    actions = (json.loads(line) for line in lines if b'"txn"' in line)
    return [action["txn"]["appId"] for action in actions if "txn" in action]
