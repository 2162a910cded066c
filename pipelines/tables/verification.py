"""Verifies a table: checks its log, its files and their manifests, and recomputes sampled units.

The log against the folder and the siblings, both ways: no unit is missing in one of them. The files against
their manifests: whole, of the recorded hash, rows and rejections adding up, ids unique. The rows against the
method: sampled units are computed again from their keys, which finds rows that are well-formed and wrong.
"""

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
from pipelines.tables.commits import WrittenUnit, written_unit
from pipelines.tables.deletion_list import redacted_id
from pipelines.tables.manifest import UnitManifest, read_manifest
from pipelines.tables.repair import COMMITTED_IN_ROUNDS
from pipelines.tables.row_keys import RowKeys
from pipelines.tables.schemas import array_type, from_png
from pipelines.tables.table import Snapshot
from pipelines.tables.unit_files import UnitFile
from pipelines.tables.unit_states import UnitStates
from snapfusion.settings import digest

Recompute = Callable[[UnitManifest, pa.Table], tuple[pa.Table, dict[str, Any]]]
"""Computes a unit again from its manifest and its rows' keys: its table, and the environment.

Raises `CannotRecompute` if the unit's inputs are not available.
"""

TOLERANCE = 0.02
"""Largest difference of a latent, or of a pixel in [0, 1], if the environment is another one.

Above 1 it is relative: guided targets reach 37 in the miniature, where rounding to float16 exceeds 0.02.
"""


class CannotRecompute(Exception):
    """A unit whose inputs are not available; the message says what is missing."""


@dataclass(frozen=True, kw_only=True)
class VerificationReport:
    """The counts and faults of a verification.

    Attributes:
        units: committed units.
        rows: rows in their files.
        rejected: rows that they rejected.
        recomputed: units that were computed again.
        exact: of those, the bit-identical ones; the others ran in another environment, within `TOLERANCE`.
        faults: one sentence for each fault; empty for a sound table.
        repairable: number of the faults that `pipelines.tables.repair` mends.
        notes: one sentence for each check that could not be made.
    """

    units: int
    rows: int
    rejected: int
    recomputed: int
    exact: int
    faults: tuple[str, ...]
    repairable: int
    notes: tuple[str, ...]


def verify_table(table: Snapshot, *, recompute: Recompute, units: int, seed: int) -> VerificationReport:
    """Check every file of `table`, and compute `units` of them again, sampled by `seed`.

    One unit is in memory at a time.
    """
    verifier = _Verifier(table, recompute)
    sampled = random.Random(seed).sample(table.units, min(units, len(table.units)))
    for file in table.units:
        verifier.check(file, recompute=file in sampled)
    verifier.check_units()
    return verifier.report()


class _Verifier:
    """Checks the units of a table one after the other and collects faults."""

    def __init__(self, table: Snapshot, recompute: Recompute) -> None:
        self.recompute = recompute
        self.identity = digest(table.identity)
        self.kind = table.identity["kind"]
        self.states = UnitStates.read(table)
        self.ids: list[np.ndarray] = []
        self.faults: list[str] = []
        self.notes: list[str] = []
        self.repairable: list[str] = []
        self.counts: Counter[str] = Counter()

    def check(self, file: UnitFile, *, recompute: bool) -> None:
        """Read one unit's file once, and compare it with the log, the siblings and perhaps the method."""
        self.counts["units"] += 1
        try:
            data = read_bytes(file.path)
            manifest = read_manifest(data)
            rows = pq.read_table(pa.BufferReader(data), page_checksum_verification=True)
        except (StorageError, ValueError, OSError, pa.ArrowException) as error:
            self.faults.append(f"{file.path}: {error}")
            return
        self.counts["rows"] += rows.num_rows
        self.counts["rejected"] += len(manifest.rejections)
        self.ids.append(_hash_ids(rows.column("id").to_pylist()))
        self.faults += self._compare_with_log(file, manifest, rows)
        self._compare_with_siblings(
            file, written_unit(file.path, data, manifest, row_keys=RowKeys.of_file(data))
        )
        if recompute:
            self._compare_recomputed(manifest, rows)

    def report(self) -> VerificationReport:
        """The counts and faults so far."""
        ids = np.concatenate(self.ids) if self.ids else np.empty(0)
        repeated = len(ids) - len(np.unique(ids))
        faults = [*self.faults, *([f"{repeated} rows have an id that another row has"] if repeated else [])]
        faults += self.repairable
        counts = {name: self.counts[name] for name in ("units", "rows", "rejected", "recomputed", "exact")}
        return VerificationReport(
            **counts, faults=tuple(faults), repairable=len(self.repairable), notes=tuple(self.notes)
        )

    def _compare_with_log(self, file: UnitFile, manifest: UnitManifest, rows: pa.Table) -> Iterator[str]:
        if manifest.unit != file.unit:
            yield f"{file.path} has the manifest of unit {manifest.unit}"
        if not rows.num_rows == file.rows == manifest.rows_written:
            yield (
                f"{file.path} has {rows.num_rows} rows; the log says {file.rows}, "
                f"its manifest {manifest.rows_written}"
            )
        if manifest.settings != self.identity:
            yield f"{file.path} was made with other settings than the table's"

    def _compare_with_siblings(self, file: UnitFile, written: WrittenUnit) -> None:
        as_committed = self.states.is_as_committed(file, sha256=written.sha256)
        if written.size != file.size or not as_committed:
            self.faults.append(f"{file.path} is not the file that was committed: its size or SHA-256 differs")
        if self.states.is_replaced(file):
            self.faults.append(
                f"{file.path} was replaced by a file without deleted rows, and the log has lost that: run "
                "jobs.forget again"
            )
        elif as_committed:
            self.repairable += self.states.sibling_faults(written)

    def check_units(self) -> None:
        """Look for units that are missing in the log, or in it twice."""
        units = Counter(file.unit for file in self.states.table.units)
        self.faults += [
            f"unit {unit} is in the log {count} times" for unit, count in units.items() if count > 1
        ]
        for lost in self.states.lost_units():
            fault = f"unit {lost.unit} was committed, and the log has lost it"
            if lost.file is None:
                self.faults.append(f"{fault} and the folder its data file: restore it from a copy")
            elif self.kind in COMMITTED_IN_ROUNDS:
                self.faults.append(f"{fault}: run jobs.find_duplicates again")
            else:
                self.repairable.append(fault)
        if files := self.states.uncommitted_files():
            self.notes.append(f"{files} data files are in no commit; the next job on the table commits them")

    def _compare_recomputed(self, manifest: UnitManifest, rows: pa.Table) -> None:
        try:
            recomputed, environment = self.recompute(manifest, rows)
        except CannotRecompute as error:
            self.notes.append(f"unit {manifest.unit} was not recomputed: {error}")
            return
        # Only the same device class, dtype and threads give the same bits.
        exact = manifest.environment == environment
        recomputed = _without_deleted_rows(recomputed, manifest)
        self.counts["recomputed"] += 1
        self.counts["exact"] += exact
        tolerance = 0.0 if exact else TOLERANCE
        self.faults += _differences(manifest.unit, rows, recomputed, tolerance=tolerance)


def _without_deleted_rows(recomputed: pa.Table, manifest: UnitManifest) -> pa.Table:
    """Drop rows that were deleted on request; a unit is recomputed whole, since bits depend on batches."""
    deleted = {rejection.id for rejection in manifest.rejections if rejection.reason == "forgotten"}
    if not deleted:
        return recomputed
    # Ids of PAIRS and TARGETS end in "#<draw>", which a redacted id keeps; others may hold a "#" too.
    ids = (id_.rpartition("#") for id_ in recomputed.column("id").to_pylist())
    redacted = (
        {redacted_id(f"{base}{mark}{draw}"), f"{redacted_id(base)}{mark}{draw}"} for base, mark, draw in ids
    )
    return recomputed.filter(pa.array([deleted.isdisjoint(either) for either in redacted], pa.bool_()))


def _hash_ids(ids: list[str]) -> np.ndarray:
    """64-bit hashes of ids, uint64 [n]: the ids of a large table would not fit in memory."""
    digests = (hashlib.blake2b(id_.encode(), digest_size=8).digest() for id_ in ids)
    return np.frombuffer(b"".join(digests), dtype=np.uint64)


def _differences(unit: str, rows: pa.Table, recomputed: pa.Table, *, tolerance: float) -> Iterator[str]:
    ids = rows.column("id").to_pylist()
    if ids != recomputed.column("id").to_pylist():
        yield f"unit {unit}: recomputed, it has other rows"
        return
    for field in recomputed.schema:
        values, expected = rows.column(field.name).to_pylist(), recomputed.column(field.name).to_pylist()
        for id_, one, other in zip(ids, values, expected, strict=True):
            if one != other and not _is_close(one, other, field, tolerance=tolerance):
                yield f"row {id_}: column {field.name} differs from the recomputed value"


def _is_close(one: object, other: object, field: pa.Field, *, tolerance: float) -> bool:
    """Whether two unequal values differ by no more than another environment explains."""
    if not tolerance or not isinstance(one, bytes) or not isinstance(other, bytes):
        return False
    metadata = field.metadata or {}
    if metadata.get(b"format") == b"png":
        pixels = np.abs(from_png(one).astype(int) - from_png(other).astype(int))
        return bool(pixels.max() <= 255 * tolerance)
    if b"<f" in metadata.get(b"dtype", b""):
        dtype = array_type(field).dtype
        a, b = (np.frombuffer(value, dtype).astype(np.float32) for value in (one, other))
        return a.shape == b.shape and bool((np.abs(a - b) <= tolerance * np.maximum(np.abs(b), 1.0)).all())
    return False
