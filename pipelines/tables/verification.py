"""Trust nothing: recount a table, compare its files with the log, and make sampled units again.

Three rings. The log against the store: every file is there, of the stated size. The files against their
accounts: whole, of the stated hash, rows and rejections adding up, ids unique. The rows against the method:
sampled units are computed again from their keys, so that a forged but well-formed row is found.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.storage.objects import StorageError, read_bytes
from pipelines.tables.deletion_list import redacted_id
from pipelines.tables.manifest import UnitManifest, read_manifest
from pipelines.tables.schemas import array_type, from_png
from pipelines.tables.table import Snapshot, UnitFile, rejected_rows, unit_records
from snapfusion.settings import digest

Recompute = Callable[[UnitManifest, pa.Table], tuple[pa.Table, dict[str, Any]]]
"""Computes a unit again from its account and its rows' keys: a table of the same schema, and the environment.

Raises `CannotRecompute` if what the unit was made from is not at hand.
"""

TOLERANCE = 0.02
"""Largest difference of a latent, or of a pixel in [0, 1], when the environment is another one.

Above 1 it is a fraction of the value: guided targets reach 37 in the miniature, where a float16 is rounded by
more than this number.
"""


class CannotRecompute(Exception):
    """A unit whose inputs are not at hand; the message says what is missing."""


@dataclass(frozen=True, kw_only=True)
class VerificationReport:
    """What a verification counted and found.

    Attributes:
        units: committed units.
        rows: rows in their files.
        rejected: rows they set aside.
        remade: how many units were computed again.
        exact: of those, how many bit for bit; the others ran in another environment, within a tolerance.
        faults: what is wrong, one sentence each; empty for a sound table.
        notes: what could not be looked at, and why.
    """

    units: int
    rows: int
    rejected: int
    remade: int
    exact: int
    faults: tuple[str, ...]
    notes: tuple[str, ...]


def verify_table(table: Snapshot, *, remake: Recompute, units: int, seed: int) -> VerificationReport:
    """Look at every file of `table`, and make `units` of them again, chosen by `seed`.

    One unit is held in memory at a time.
    """
    inspection = _Verifier(table, remake)
    chosen = random.Random(seed).sample(table.units, min(units, len(table.units)))
    for file in table.units:
        inspection.look_at(file, again=file in chosen)
    return inspection.findings()


class _Verifier:
    """Goes through the units of a table and remembers what it found."""

    def __init__(self, table: Snapshot, remake: Recompute) -> None:
        self.remake = remake
        self.identity = digest(table.identity)
        self.records = {record["unit"]: record for record in unit_records(table.url)}
        self.set_aside = Counter((row["unit"], row["id"]) for row in rejected_rows(table.url))
        self.ids: list[np.ndarray] = []
        self.faults: list[str] = []
        self.notes: list[str] = []
        self.counts: Counter[str] = Counter()

    def look_at(self, file: UnitFile, *, again: bool) -> None:
        """Read one unit's file once, and compare it with all that is said of it."""
        self.counts["units"] += 1
        try:
            data = read_bytes(file.path)
            account = read_manifest(data)
            rows = pq.read_table(pa.BufferReader(data))
        except (StorageError, ValueError, pa.ArrowException) as error:
            self.faults.append(f"{file.path}: {error}")
            return
        self.counts["rows"] += rows.num_rows
        self.counts["rejected"] += len(account.rejections)
        self.ids.append(_hashes(rows.column("id").to_pylist()))
        self.faults += self._against_log(file, account, rows)
        self.faults += self._against_siblings(file, account, data)
        if again:
            self._make_again(account, rows)

    def findings(self) -> VerificationReport:
        """All of it."""
        ids = np.concatenate(self.ids) if self.ids else np.empty(0)
        twice = len(ids) - len(np.unique(ids))
        doubled = [f"{twice} rows have an id that another row has"] if twice else []
        return VerificationReport(
            units=self.counts["units"],
            rows=self.counts["rows"],
            rejected=self.counts["rejected"],
            remade=self.counts["remade"],
            exact=self.counts["exact"],
            faults=(*self.faults, *doubled),
            notes=tuple(self.notes),
        )

    def _against_log(self, file: UnitFile, account: UnitManifest, rows: pa.Table) -> Iterator[str]:
        if account.unit != file.unit:
            yield f"{file.path} states that it is unit {account.unit}"
        if not rows.num_rows == file.rows == account.rows_written:
            yield (
                f"{file.path} has {rows.num_rows} rows; the log says {file.rows}, "
                f"its account {account.rows_written}"
            )
        if account.settings != self.identity:
            yield f"{file.path} was made with other settings than the table's"

    def _against_siblings(self, file: UnitFile, account: UnitManifest, data: bytes) -> Iterator[str]:
        record = self.records.get(file.unit)
        if record is None:
            yield f"unit {file.unit} has no row in the units table; the next job on the table restores it"
            return
        if len(data) != file.size or hashlib.sha256(data).hexdigest() != record["sha256"]:
            yield f"{file.path} is not the file that was committed: its size or SHA-256 differs"
        if record["account"] != account.to_json():
            yield f"unit {file.unit}: the units table and the file's own account differ"
        stated = Counter((file.unit, rejection.id) for rejection in account.rejections)
        if stated != Counter({key: n for key, n in self.set_aside.items() if key[0] == file.unit}):
            yield f"unit {file.unit}: the rejected rows and the file's own account differ"

    def _make_again(self, account: UnitManifest, rows: pa.Table) -> None:
        try:
            again, environment = self.remake(account, rows)
        except CannotRecompute as error:
            self.notes.append(f"unit {account.unit} was not made again: {error}")
            return
        exactly = account.environment == environment
        again = _without_deleted_rows(again, account)
        self.counts["remade"] += 1
        self.counts["exact"] += exactly
        self.faults += _differences(account.unit, rows, again, tolerance=0.0 if exactly else TOLERANCE)


def _without_deleted_rows(again: pa.Table, account: UnitManifest) -> pa.Table:
    """A unit is made again whole, because bits depend on batches; then it has what was taken out of it."""
    gone = {rejection.id for rejection in account.rejections if rejection.reason == "forgotten"}
    if not gone:
        return again
    ids = (id_.rpartition("#") for id_ in again.column("id").to_pylist())
    names = (
        {redacted_id(f"{base}{mark}{draw}"), f"{redacted_id(base)}{mark}{draw}"} for base, mark, draw in ids
    )
    return again.filter(pa.array([gone.isdisjoint(one) for one in names], pa.bool_()))


def _hashes(ids: list[str]) -> np.ndarray:
    digests = (hashlib.blake2b(id_.encode(), digest_size=8).digest() for id_ in ids)
    return np.frombuffer(b"".join(digests), dtype=np.uint64)


def _differences(unit: str, rows: pa.Table, again: pa.Table, *, tolerance: float) -> Iterator[str]:
    ids = rows.column("id").to_pylist()
    if ids != again.column("id").to_pylist():
        yield f"unit {unit}: made again it has other rows"
        return
    for field in again.schema:
        found, wanted = rows.column(field.name).to_pylist(), again.column(field.name).to_pylist()
        for id_, one, other in zip(ids, found, wanted, strict=True):
            if one != other and not _is_close(one, other, field, tolerance=tolerance):
                yield f"row {id_}: column {field.name} is not what its keys give"


def _is_close(one: object, other: object, field: pa.Field, *, tolerance: float) -> bool:
    """Whether two unequal values differ no more than another environment makes them."""
    if not tolerance or not isinstance(one, bytes) or not isinstance(other, bytes):
        return False
    metadata = field.metadata or {}
    if metadata.get(b"format") == b"png":
        pixels = np.abs(from_png(one).astype(int) - from_png(other).astype(int))
        return bool(pixels.max() <= 255 * tolerance)
    if b"<f" in metadata.get(b"dtype", b""):
        dtype = array_type(field).dtype
        found, wanted = (np.frombuffer(value, dtype).astype(np.float32) for value in (one, other))
        return found.shape == wanted.shape and bool(
            (np.abs(found - wanted) <= tolerance * np.maximum(np.abs(wanted), 1.0)).all()
        )
    return False
