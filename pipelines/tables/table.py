"""Delta Lake tables whose rows are committed unit by unit, each unit exactly once.

A table at `url` is plain Parquet files and a transaction log. Beside it stand the tables `url.rejects` (the
rejected rows) and `url.units` (one row a unit). Both can be rebuilt from the manifests in the data files, so
the log of the main table alone decides what is committed.
"""

import copy
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields
from functools import cached_property, partial
from operator import itemgetter
from typing import Any
from urllib.parse import unquote

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError

from pipelines.storage.durability import sync
from pipelines.storage.faults import plain_text
from pipelines.storage.objects import (
    IO_THREADS,
    absolute_url,
    check_table_url,
    is_local,
    local_path,
    read_bytes,
)
from pipelines.storage.retry import with_retries
from pipelines.tables.integrity import read_rows
from pipelines.tables.manifest import UnitManifest, UnitRecord
from pipelines.tables.schemas import REJECTS, SCHEMA_VERSION, UNITS
from pipelines.tables.unit_files import UnitFile, UnitList
from snapfusion.settings import differences, digest

_IDENTITY = "snapfusion.identity"
# Delta deletes log entries after 30 days by default; here the log is the only record of what is committed.
_KEEP_LOG = {"delta.logRetentionDuration": "interval 36500 days", "delta.enableExpiredLogCleanup": "false"}
# Statistics would keep the least and greatest texts of rows in the log, where no deletion reaches them.
_NO_STATISTICS = {"delta.dataSkippingNumIndexedCols": "0"}
_FILE_COLUMNS = ("path", "num_records", "size_bytes")
_SIBLINGS = {"rejects": REJECTS, "units": UNITS}
_BINARY = 'PrimitiveType("binary")'


class TableError(ValueError):
    """A table that is missing, made by another program, or unfit; the message says how it differs."""


class Snapshot:
    """One version of a table: a fixed list of files, read in order of their units.

    A job opens its table once and passes the snapshot on, to other processes too: pickled, it takes a few
    bytes a unit. The table of units is opened when it is first read.

    Args:
        url: of the table, absolute.
        delta: the Delta table at this version.

    Raises:
        TableError: if the log names a file outside the table's folder.
    """

    def __init__(self, url: str, delta: DeltaTable) -> None:
        self.url = url
        self.version: int = delta.version()
        self.identity: dict[str, Any] = json.loads(delta.metadata().configuration.get(_IDENTITY, "{}"))
        self.columns: list[str] = [field.name for field in delta.schema().fields]
        # Copied, so that the snapshot stays as it is whatever becomes of the log.
        self._actions = _add_actions(delta)
        # Ids and numbers are a small part of a file; whoever reads one of these columns reads most of it.
        self._arrays = {field.name for field in delta.schema().fields if str(field.type) == _BINARY}

    @cached_property
    def units(self) -> UnitList:
        """The committed units, ordered by name: the log's own order is that of arrival."""
        # They are in the list from now on, and not twice in memory.
        actions = vars(self).pop("_actions")
        names, rows, sizes = (actions.column(name).combine_chunks() for name in _FILE_COLUMNS)
        return UnitList.in_order(self.url, names=names, rows=rows, sizes=sizes)

    def __getstate__(self) -> dict[str, Any]:
        kept = ("url", "version", "identity", "columns", "_arrays")
        return {name: vars(self)[name] for name in kept} | {"units": self.units}

    def of_units(self, units: UnitList) -> "Snapshot":
        """This version with some of its units alone."""
        part = copy.copy(self)
        vars(part)["units"] = units
        return part

    @property
    def num_rows(self) -> int:
        """Rows in all units."""
        return self.units.num_rows

    def read_unit(self, unit: UnitFile, columns: Sequence[str] | None = None) -> pa.Table:
        """The rows of one unit in the order in which they were written; all columns, or those named.

        Raises:
            TableError: if the file is missing, as those of old versions are after a deletion request.
            DamagedFileError: if it was altered.
        """
        checks_all = columns is None or not self._arrays.isdisjoint(columns)

        def read() -> pa.Table:
            with fsspec.open(unit.path, "rb") as file:
                # Whole files come in one request; of chosen columns only their byte ranges are fetched.
                data = pa.py_buffer(file.read()) if columns is None else file
                # Of `.units`, which is read only for a file without checksums of its pages.
                sha256 = (lambda: self._sha256.get(unit.unit)) if checks_all else (lambda: None)
                return read_rows(unit.path, data, columns, sha256=sha256)

        try:
            return with_retries(unit.path, read)
        except FileNotFoundError:
            raise TableError(
                f"{unit.path} of version {self.version} is gone: rows of it were forgotten and erased, or it "
                "was deleted; read the newest version"
            ) from None

    def read(self, columns: Sequence[str] | None = None) -> pa.Table:
        """All rows, ordered by unit; for tables that fit in memory."""
        tables = [self.read_unit(unit, columns) for unit in self.units]
        if not tables:
            raise TableError(f"{self.url} has no committed rows at version {self.version}")
        return pa.concat_tables(tables)

    def manifests(self) -> dict[str, UnitManifest]:
        """The manifests of the committed units, by unit."""
        rows = self._unit_rows(["unit", "account"])
        return {row["unit"]: UnitManifest.from_json(row["account"]) for row in rows}

    def unit_records(self) -> list[UnitRecord]:
        """The rows of the table of units (`schemas.UNITS`) whose unit is committed, ordered by unit."""
        rows = self._unit_rows([field.name for field in fields(UnitRecord)])
        return sorted((UnitRecord(**row) for row in rows), key=lambda record: record.unit)

    def recorded(self, columns: Sequence[str]) -> pa.Table:
        """Columns of the table of units (`schemas.UNITS`), one row a file in the order of `units`.

        Null for a file without a row, or whose row is of an earlier version, which does not name its file.
        """
        rows = self._sibling_rows(["file", *columns])
        positions = self.units.positions_in(rows["file"].combine_chunks())
        return rows.select(list(columns)).take(positions)

    def rejected_rows(self) -> list[dict[str, Any]]:
        """The rejected rows (`schemas.REJECTS`) of committed units, ordered by unit and id."""
        committed = {file.unit for file in self.units}
        rows = read_sibling(f"{self.url}.rejects")
        return sorted((row for row in rows if row["unit"] in committed), key=itemgetter("unit", "id"))

    def lineage(self) -> dict[str, Any]:
        """Record of this snapshot in a table or model made from it."""
        return {"table": self.url, "version": self.version, "identity": digest(self.identity)}

    @cached_property
    def _sha256(self) -> dict[str, str]:
        return {row["unit"]: row["sha256"] for row in self._unit_rows(["unit", "account", "sha256"])}

    @cached_property
    def _units_delta(self) -> DeltaTable:
        return open_delta(f"{self.url}.units")

    def _sibling_rows(self, columns: Sequence[str]) -> pa.Table:
        return read_sibling_files(f"{self.url}.units", live_names(self._units_delta), columns)

    def _unit_rows(self, columns: Sequence[str]) -> list[dict[str, Any]]:
        """Rows of the table of units, without those of files that were replaced or are not committed yet."""
        committed = {file.unit: file for file in self.units}
        rows = self._sibling_rows(columns)
        return [
            row
            for row in rows.filter(pc.is_in(rows["unit"], self.units.unit_names)).to_pylist()
            if (file := committed.get(row["unit"])) and file.has_manifest(row["account"])
        ]


def is_table(url: str) -> bool:
    """Whether there is a Delta table, of this project or another."""
    check_table_url(url)
    # Asked about a file, deltalake fails to list it as a folder.
    if is_local(url) and local_path(url).is_file():
        return False
    return with_retries(url, lambda: bool(DeltaTable.is_deltatable(url)))


def open_delta(location: str, *, version: int | None = None) -> DeltaTable:
    """The Delta table at its newest version, or at a given one.

    Raises:
        TableError: if there is none, or its log is damaged.
    """
    check_table_url(location)
    with _raising_table_error(location):
        return with_retries(location, lambda: DeltaTable(location, version=version))


@contextmanager
def _raising_table_error(location: str) -> Iterator[None]:
    try:
        yield
    except DeltaError as error:
        raise TableError(f"{location} holds no table that can be opened: {plain_text(error)}") from None


def open_table(url: str, *, version: int | None = None, kind: str | None = None) -> Snapshot:
    """A table at its newest version, or at a given one.

    Raises:
        TableError: if there is none, another program made it, or it is of another kind.
    """
    location = absolute_url(url)
    with _raising_table_error(location):
        snapshot = Snapshot(location, open_delta(location, version=version))
    if not snapshot.identity:
        raise TableError(f"{url} is a Delta table without our identity: it was made by another program")
    if kind is not None and snapshot.identity["kind"] != kind:
        raise TableError(f"{url} holds {snapshot.identity['kind']}; {kind} is needed")
    return snapshot


def create_table(url: str, *, schema: pa.Schema, identity: dict[str, Any]) -> Snapshot:
    """The table at `url`, created if there is none; an existing one must have the given identity.

    `identity` is everything that determines the rows: model, settings, seed. Rows of two identities would mix
    unnoticed, so a table of another identity is refused.

    Raises:
        TableError: naming the first settings that differ.
    """
    location = absolute_url(url)
    identity = {**identity, "schema_version": SCHEMA_VERSION}
    configuration = {**_KEEP_LOG, _IDENTITY: json.dumps(identity, sort_keys=True)}
    try:
        # Each is checked on its own: a run that was killed may have created only the first.
        _create(location, schema, configuration)
        _create(f"{location}.rejects", REJECTS, {**_KEEP_LOG, **_NO_STATISTICS})
        _create(f"{location}.units", UNITS, {**_KEEP_LOG, **_NO_STATISTICS})
    except (DeltaError, OSError) as error:
        raise TableError(f"{url} cannot be created: {plain_text(error)}") from error
    # Compared after the creation: of two runs that race, the second finds the identity of the first.
    snapshot = open_table(location)
    differing = list(differences(snapshot.identity, identity))
    if differing:
        raise TableError(f"{url} was made with other settings: {'; '.join(differing[:3])}; give a new table")
    return snapshot


def live_names(delta: DeltaTable) -> list[str]:
    """The names of a version's data files in the table's folder.

    Raises:
        TableError: if the log names a file elsewhere.
    """
    names: list[str] = _add_actions(delta).column("path").to_pylist()
    return names


def read_sibling(location: str) -> list[dict[str, Any]]:
    """All rows of the newest version of a table's sibling, whether their units are committed or not."""
    rows: list[dict[str, Any]] = read_sibling_files(location, live_names(open_delta(location))).to_pylist()
    return rows


def _add_actions(delta: DeltaTable) -> pa.Table:
    actions = pa.table(delta.get_add_actions(flatten=True))
    actions = actions.set_column(
        actions.column_names.index("path"), "path", actions.column("path").cast(pa.string())
    )
    paths = actions.column("path")
    # Delta allows other folders, which our tables never have. It decodes paths before it opens them.
    suspect = pc.or_(pc.match_substring(paths, "/"), pc.match_substring(paths, "%"))
    for path in paths.filter(suspect).to_pylist():
        if "/" in unquote(path):
            raise TableError(
                f"the log of {delta.table_uri} names {path!r}, which is no file of its folder: the log was "
                "altered; restore it from a copy"
            )
    return actions


def read_sibling_files(location: str, names: Sequence[str], columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of a sibling's files of these names; columns that an earlier version did not write are null.

    Raises:
        TableError: if a file is damaged.
    """
    schema = _SIBLINGS[location.rpartition(".")[2]]
    with ThreadPoolExecutor(IO_THREADS) as readers:
        paths = [f"{location}/{name}" for name in sorted(names)]
        tables = [*readers.map(partial(_read_sibling_file, columns=columns), paths)]
    rows = pa.concat_tables([schema.empty_table(), *tables], promote_options="permissive")
    return rows if columns is None else rows.select(list(columns))


def _read_sibling_file(path: str, *, columns: Sequence[str] | None) -> pa.Table:
    try:
        with pq.ParquetFile(pa.BufferReader(read_bytes(path)), page_checksum_verification=True) as file:
            known = file.schema_arrow.names
            return file.read(None if columns is None else [name for name in columns if name in known])
    except (pa.ArrowException, OSError) as error:
        main = path.rpartition("/")[0].rpartition(".")[0]
        raise TableError(
            f"{path} is damaged: {plain_text(error)}; remove {main}.units and .rejects: "
            "the next job that writes the table restores both from its data files"
        ) from None


def _create(location: str, schema: pa.Schema, configuration: dict[str, str]) -> None:
    if not is_table(location):
        # Two runs may race to create it; "ignore" lets the second find it there.
        create = partial(DeltaTable.create, location, mode="ignore", raise_if_key_not_exists=False)
        with_retries(location, lambda: create(schema=schema, configuration=configuration))
        if is_local(location):
            # deltalake syncs neither the first log entry nor the folders that it creates.
            folder, log = local_path(location), local_path(location) / "_delta_log"
            for path in (log / f"{0:020d}.json", log, folder, folder.parent):
                sync(path)
