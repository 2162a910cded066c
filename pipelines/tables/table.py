"""Delta Lake tables whose rows arrive unit by unit, each exactly once.

A table at `url` is plain Parquet files and a transaction log. Beside it lie `url.rejects` (rows set aside)
and `url.units` (one row a unit); both can be made again from the data files' own accounts, so the log of the
main table is the only thing that decides what is committed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError, TableNotFoundError

from pipelines.storage.objects import absolute_url, read_bytes
from pipelines.storage.retry import with_retries
from pipelines.tables.manifest import UnitManifest
from pipelines.tables.schemas import REJECTS, SCHEMA_VERSION, UNITS
from snapfusion.settings import differences, digest

_IDENTITY = "snapfusion.identity"
# The log is the account of what is committed: nothing in it may expire.
_KEEP_LOG = {"delta.logRetentionDuration": "interval 36500 days", "delta.enableExpiredLogCleanup": "false"}
# The log would keep the least and the greatest of their texts, and cannot forget them.
_NO_STATISTICS = {"delta.dataSkippingNumIndexedCols": "0"}
_REVISION_MARK = "~"


class TableError(ValueError):
    """A table that is missing, is not ours, or does not fit; the message names the difference."""


@dataclass(frozen=True, kw_only=True)
class UnitFile:
    """A committed unit: its name, its file, its size and rows.

    A file that stands in the place of the unit's first one has a mark in its name (see `revised_name`).
    """

    unit: str
    path: str
    rows: int
    size: int

    @property
    def mark(self) -> str:
        """What the file's name says of its account; empty for the file that the unit was committed with."""
        return _split(self.path)[1]

    def is_told_by(self, account: str) -> bool:
        """Whether an account, in its one spelling, is that of this file and not of one that it replaced."""
        return self.mark in ("", revision_of(account))


def revised_name(unit: str, account: str) -> str:
    """The name of a file that is to stand in the place of a unit's earlier one: `<unit>~<mark>.parquet`.

    The mark follows from the account, so whoever writes the same writes it under the same name.
    """
    return f"{unit}{_REVISION_MARK}{revision_of(account)}.parquet"


def revision_of(account: str) -> str:
    """The first 16 digits of the SHA-256 of an account in its one spelling."""
    return hashlib.sha256(account.encode()).hexdigest()[:16]


def unit_of(path: str) -> str:
    """The unit whose rows a data file holds, by its name."""
    return _split(path)[0]


def _split(path: str) -> tuple[str, str]:
    unit, _, mark = path.rpartition("/")[2].removesuffix(".parquet").partition(_REVISION_MARK)
    return unit, mark


class Snapshot:
    """One version of a table: a fixed list of files, read in order of their units."""

    def __init__(self, url: str, delta: DeltaTable) -> None:
        self.url = url
        self.version: int = delta.version()
        self.identity: dict[str, Any] = json.loads(_configuration(delta).get(_IDENTITY, "{}"))
        self.columns: list[str] = [field.name for field in delta.schema().fields]
        self._actions = pa.table(delta.get_add_actions(flatten=True))

    @cached_property
    def units(self) -> list[UnitFile]:
        """The committed units, ordered by name: the log's own order is that of arrival."""
        rows = self._actions.select(["path", "size_bytes", "num_records"]).to_pylist()
        files = [
            UnitFile(
                unit=unit_of(row["path"]),
                path=f"{self.url}/{row['path']}",
                rows=row["num_records"],
                size=row["size_bytes"],
            )
            for row in rows
        ]
        return sorted(files, key=lambda file: file.unit)

    @property
    def num_rows(self) -> int:
        """Rows in all units."""
        return sum(file.rows for file in self.units)

    def read_unit(self, unit: UnitFile, columns: Sequence[str] | None = None) -> pa.Table:
        """The rows of one unit, in the order in which they were written; of the columns named, only these.

        Raises:
            TableError: if the file is gone, as those of old versions are once they were erased.
        """

        def read() -> pa.Table:
            with fsspec.open(unit.path, "rb") as file:
                whole = pa.BufferReader(file.read()) if columns is None else file
                return pq.read_table(whole, columns=columns)

        try:
            return with_retries(unit.path, read)
        except FileNotFoundError:
            raise TableError(
                f"{unit.path} is gone, which version {self.version} reads: rows of it were forgotten and "
                "erased, or it was deleted; read the newest version"
            ) from None

    def read(self, columns: Sequence[str] | None = None) -> pa.Table:
        """All rows, ordered by unit. For tables that fit in memory."""
        tables = [self.read_unit(unit, columns) for unit in self.units]
        if not tables:
            raise TableError(f"{self.url} has no committed rows at version {self.version}")
        return pa.concat_tables(tables)

    def lineage(self) -> dict[str, Any]:
        """What a child of this table records of it."""
        return {"table": self.url, "version": self.version, "identity": digest(self.identity)}


def is_table(url: str) -> bool:
    """Whether a table of ours (or any Delta table) is there."""
    location = absolute_url(url)
    return with_retries(location, lambda: bool(DeltaTable.is_deltatable(location)))


def open_delta(location: str, *, version: int | None = None) -> DeltaTable:
    """The Delta table as its log has it now, or at a version."""
    return with_retries(location, lambda: DeltaTable(location, version=version))


def open_table(url: str, *, version: int | None = None, kind: str | None = None) -> Snapshot:
    """A table at its newest version, or at a given one.

    Raises:
        TableError: if there is none, it was not made by this project, or it is of another kind.
    """
    location = absolute_url(url)
    try:
        snapshot = Snapshot(location, open_delta(location, version=version))
    except (TableNotFoundError, DeltaError) as error:
        raise TableError(f"{url} holds no table that can be opened: {_first_line(error)}") from None
    if not snapshot.identity:
        raise TableError(f"{url} is a Delta table without our identity: it was made by another program")
    if kind is not None and snapshot.identity["kind"] != kind:
        raise TableError(f"{url} holds {snapshot.identity['kind']}; {kind} is needed")
    return snapshot


def create_table(url: str, *, schema: pa.Schema, identity: dict[str, Any]) -> Snapshot:
    """The table at `url`, made if it is not there; its identity must be the one given.

    `identity` is everything that determines the rows: model, settings, seed. Rows made under another
    identity would mix silently, so the table is refused.

    Raises:
        TableError: naming the first settings that differ.
    """
    location = absolute_url(url)
    identity = {**identity, "schema_version": SCHEMA_VERSION}
    configuration = {**_KEEP_LOG, _IDENTITY: json.dumps(identity, sort_keys=True)}
    try:
        _create(location, schema, configuration)
        _create(f"{location}.rejects", REJECTS, {**_KEEP_LOG, **_NO_STATISTICS})
        _create(f"{location}.units", UNITS, {**_KEEP_LOG, **_NO_STATISTICS})
    except (DeltaError, OSError) as error:
        raise TableError(f"{url} cannot be made: {_first_line(error)}") from None
    snapshot = open_table(url)
    differing = list(differences(snapshot.identity, identity))
    if differing:
        raise TableError(f"{url} was made with other settings: {'; '.join(differing[:3])}; give a new table")
    return snapshot


def unit_manifests(url: str) -> dict[str, UnitManifest]:
    """The accounts of the committed units, by unit name, from the sibling `units` table."""
    rows = _records(url, columns=["unit", "account"])
    return {row["unit"]: UnitManifest.from_json(row["account"]) for row in rows}


def unit_records(url: str) -> list[dict[str, Any]]:
    """The rows of the `units` table whose unit is committed, ordered by unit."""
    return sorted(_records(url), key=lambda row: row["unit"])


def rejected_rows(url: str) -> list[dict[str, Any]]:
    """The rows set aside by committed units, ordered by unit and id."""
    committed = {file.unit for file in open_table(url).units}
    rows = _sibling(url, "rejects")
    kept = (row for row in rows if row["unit"] in committed)
    return sorted(kept, key=lambda row: (row["unit"], row["id"]))


def _records(url: str, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """What `units` says of committed files. Of files that were replaced by others it may still speak."""
    committed = {file.unit: file for file in open_table(url).units}
    rows = _sibling(url, "units", columns)
    return [
        row for row in rows if row["unit"] in committed and committed[row["unit"]].is_told_by(row["account"])
    ]


def _sibling(url: str, name: str, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
    files = sorted(open_delta(f"{absolute_url(url)}.{name}").file_uris())
    tables = (pq.read_table(pa.BufferReader(read_bytes(file)), columns=columns) for file in files)
    return [row for table in tables for row in table.to_pylist()]


def _create(location: str, schema: pa.Schema, configuration: dict[str, str]) -> None:
    def make() -> None:
        # Two runs may race to make it; the one that comes second finds it made.
        DeltaTable.create(
            location, schema=schema, mode="ignore", configuration=configuration, raise_if_key_not_exists=False
        )

    if not is_table(location):
        with_retries(location, make)


def _configuration(delta: DeltaTable) -> dict[str, str]:
    return dict(delta.metadata().configuration)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
