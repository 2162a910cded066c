"""Deletes rows on a deletion list, and whatever was derived from them, from committed tables.

 matches ─ files without them ─ commits: PAIRS, TARGETS, LATENTS, others ─ repeated until there is no match

A unit keeps its name, its range and its manifest: deleted rows are rejected as `forgotten`, without their id.
Old versions keep the old files until those are erased (`pipelines.deletion.erasure`).
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.datasets.latents import file_hashes
from pipelines.datasets.pairs import captions_in, withhold_deleted
from pipelines.deletion.table_matches import DELETION_ORDER, Match, base_id, find_matches, is_derived
from pipelines.rejections import Rejected
from pipelines.sources.captions import Caption, CaptionRow, captions_digest
from pipelines.storage.objects import read_bytes
from pipelines.tables.commits import (
    WrittenUnit,
    read_written_unit,
    replace_units,
    restore_manifests,
    write_unit,
)
from pipelines.tables.committer import recover
from pipelines.tables.compacted import compaction_of
from pipelines.tables.deletion_list import DeletionKeys, redacted_id
from pipelines.tables.leases import write_leases
from pipelines.tables.manifest import UnitManifest
from pipelines.tables.table import Snapshot, TableError, open_table
from pipelines.tables.unit_files import UnitFile, revised_name

_MODEL_REASONS = ("not_finite", "crashed")
"""Reasons to reject a caption that was in the list and is no row of PAIRS."""
_MAX_ROUNDS = 20


@dataclass(kw_only=True)
class Removal:
    """The rows deleted from a table.

    Attributes:
        url: of the table.
        kind: of the table.
        before: its version before.
        after: its version afterwards.
        rows: number of deleted rows.
        rejections: rows that had been rejected before and lost id and detail, by reason.
        units: whose files were replaced.
        notes: anything that could not be done.
    """

    url: str
    kind: str
    before: int
    after: int
    rows: int = 0
    rejections: Counter[str] = field(default_factory=Counter)
    units: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class _Change:
    """A committed file, and the one that is to replace it."""

    old: UnitFile
    new: WrittenUnit
    match: Match


def delete_rows(urls: Sequence[str], keys: DeletionKeys) -> list[Removal]:
    """Delete everything on the list from the tables; returns one removal for each table.

    Each round searches the tables again, until nothing is left. So units that other jobs commit meanwhile are
    found, and a killed deletion continues when it is called again.

    Raises:
        TableError: if other writers keep adding deleted rows.
    """
    with write_leases(urls, purpose="a deletion"):
        return _delete_rows(urls, keys)


def _delete_rows(urls: Sequence[str], keys: DeletionKeys) -> list[Removal]:
    removals = {}
    for url in urls:
        table = open_table(url)
        kind = table.identity["kind"]
        # Files of a round of DUPLICATES that was never committed must not be committed one by one.
        table = restore_manifests(table) if kind == "duplicates" else recover(table)
        removals[url] = Removal(url=table.url, kind=kind, before=table.version, after=table.version)
    # A round ends at the first lost commit; its files are written again under the same names.
    for _ in range(_MAX_ROUNDS):
        if not _round(removals, keys):
            return list(removals.values())
    raise TableError(f"after {_MAX_ROUNDS} rounds other jobs still add deleted rows; run again after them")


def _round(removals: Mapping[str, Removal], keys: DeletionKeys) -> bool:
    """Write new files for all tables, then commit them; whether there was anything to do."""
    tables = {url: open_table(url) for url in removals}
    by_kind = {kind: [url for url, one in removals.items() if one.kind == kind] for kind in DELETION_ORDER}
    changes: dict[str, list[_Change]] = {}
    for url in (*by_kind["latents"], *by_kind["duplicates"], *by_kind["fingerprints"]):
        changes[url] = [_rewrite(tables[url], match) for match in find_matches(tables[url], keys)]
    # TARGETS state the hash of their LATENTS file, so the new LATENTS files must be known first.
    latents = _PlannedLatents([(tables[url], changes[url]) for url in by_kind["latents"]])
    for url in by_kind["targets"]:
        changes[url] = list(_plan_targets(tables[url], keys, latents=latents))
    for url in by_kind["pairs"]:
        changes[url] = list(_plan_pairs(tables[url], keys, latents=latents, notes=removals[url].notes))
    # Committed in the other order: see DELETION_ORDER.
    for url in (url for kind in DELETION_ORDER for url in by_kind[kind]):
        if changes[url] and not _commit(removals[url], changes[url]):
            return True
    return any(changes.values())


def _commit(removal: Removal, changes: Sequence[_Change]) -> bool:
    """Replace the files and record it; False if another writer came first."""
    if not replace_units(removal.url, [(change.old, change.new) for change in changes]):
        return False
    removal.after = open_table(removal.url).version
    for match in (change.match for change in changes):
        removal.units.add(match.file.unit)
        removal.rows += len(match.rows)
        removal.rejections.update(match.manifest.rejections[index].reason for index in match.rejections)
    return True


def _rewrite(table: Snapshot, match: Match, *, source_digest: str | None = None) -> _Change:
    """Write the unit's file without the matches; nothing is committed yet."""
    # Checked as it is read: a flipped bit would be written anew, with a checksum that fits.
    manifest, rows = match.manifest, table.read_unit(match.file)
    ids, ordinals = rows["id"].to_pylist(), manifest.ordinals()
    redact = partial(_redact, derived=is_derived(table))
    forgotten, rejections = Rejected("forgotten"), list(manifest.rejections)
    for index in match.rejections:
        rejections[index] = replace(rejections[index], id=redact(rejections[index].id), detail="")
    rejections += [
        forgotten.record(id=redact(ids[index]), source=manifest.source, ordinal=ordinals[index])
        for index in match.rows
    ]
    manifest = replace(
        manifest,
        rows_written=manifest.rows_written - len(match.rows),
        rejections=tuple(rejections),
        source_digest=source_digest or manifest.source_digest,
    )
    path = f"{table.url}/{revised_name(match.file.unit, manifest.to_json())}"
    removed = set(match.rows)
    mask = pa.array([index not in removed for index in range(rows.num_rows)], pa.bool_())
    return _Change(old=match.file, new=write_unit(rows.filter(mask), manifest, path=path), match=match)


def _redact(id_: str, *, derived: bool) -> str:
    """A redacted id; that of a derived row keeps its draw, by which verification finds the row."""
    base, mark, draw = id_.rpartition("#") if derived else (id_, "", "")
    return f"{redacted_id(base)}{mark}{draw}"


def _read(path: str, columns: Sequence[str] | None = None) -> pa.Table:
    return pq.read_table(pa.BufferReader(read_bytes(path)), columns=columns)


@dataclass(frozen=True, kw_only=True)
class _PlannedFile:
    """The file that a unit of LATENTS will have after this round."""

    path: str
    sha256: str
    replaced: bool


class _PlannedLatents:
    """LATENTS as they will be after this round."""

    def __init__(self, planned: Sequence[tuple[Snapshot, Sequence[_Change]]]) -> None:
        self._tables = [table for table, _ in planned]
        self._files = [_planned_files(table, changes) for table, changes in planned]

    def candidates(self, targets: Snapshot, manifest: UnitManifest) -> list[_PlannedFile]:
        """The files from which a unit of TARGETS may have been made."""
        return [
            files[manifest.source]
            for table, files in zip(self._tables, self._files, strict=True)
            if table.identity == targets.identity["latents"] and manifest.source in files
        ]

    def captions(self, ids: set[str]) -> dict[str, str]:
        """The captions of these rows, as far as LATENTS have them."""
        captions: dict[str, str] = {}
        for table in self._tables if ids else ():
            for file in table.units:
                rows = table.read_unit(file, ["id", "caption"]).to_pydict()
                pairs = zip(rows["id"], rows["caption"], strict=True)
                captions |= {id_: text for id_, text in pairs if id_ in ids}
        return captions


def _planned_files(table: Snapshot, changes: Sequence[_Change]) -> dict[str, _PlannedFile]:
    hashes = file_hashes(table)
    files = {
        file.unit: _PlannedFile(path=file.path, sha256=hashes[file.unit], replaced=bool(file.revision))
        for file in table.units
    }
    for change in changes:
        files[change.old.unit] = _PlannedFile(path=change.new.path, sha256=change.new.sha256, replaced=True)
    return files


def _plan_targets(table: Snapshot, keys: DeletionKeys, *, latents: _PlannedLatents) -> Iterator[_Change]:
    """New files for units of TARGETS that have a match, or were made from a file that is replaced."""
    matches = {match.file.unit: match for match in find_matches(table, keys)}
    manifests = table.manifests()
    for file in table.units:
        manifest = manifests.get(file.unit) or read_written_unit(file.path).manifest
        match = matches.get(file.unit) or Match(file=file, manifest=manifest)
        source_digest = _new_source_digest(match, latents.candidates(table, manifest))
        if match or source_digest is not None:
            yield _rewrite(table, match, source_digest=source_digest)


def _new_source_digest(match: Match, candidates: Sequence[_PlannedFile]) -> str | None:
    """The hash of the replacing LATENTS file, for a unit of TARGETS that states that of a replaced one.

    Without it the next job would refuse the unit, as made from other LATENTS.
    """
    if match.manifest.source_digest not in {candidate.sha256 for candidate in candidates}:
        for candidate in candidates:
            if candidate.replaced and _has_same_latents(match, candidate):
                return candidate.sha256
    return None


def _has_same_latents(match: Match, candidate: _PlannedFile) -> bool:
    """Whether the remaining rows of a unit of TARGETS have the latents of a file of LATENTS."""
    rows, source = (_read(path, ["id", "latent"]).to_pydict() for path in (match.file.path, candidate.path))
    latents = dict(zip(source["id"], source["latent"], strict=True))
    return all(
        latents.get(base_id(id_)) == latent
        for index, (id_, latent) in enumerate(zip(rows["id"], rows["latent"], strict=True))
        if index not in match.rows
    )


def _plan_pairs(
    table: Snapshot, keys: DeletionKeys, *, latents: _PlannedLatents, notes: list[str]
) -> Iterator[_Change]:
    """New files for units of PAIRS that have a match, each with the digest of its captions without it."""
    for match in find_matches(table, keys):
        manifest = match.manifest
        lost = {base_id(one.id) for one in manifest.rejections if one.reason in _MODEL_REASONS}
        captions = _captions_of(manifest, _read(match.file.path), texts=latents.captions(lost))
        source_digest = None
        if captions_digest(captions) == manifest.source_digest:
            source_digest = captions_digest(withhold_deleted(captions, keys))
        elif compaction_of(table.identity) is None:
            notes.append(
                f"the captions of unit {match.file.unit} cannot be reconstructed, so jobs.generate_pairs "
                "will need a new table"
            )
        yield _rewrite(table, match, source_digest=source_digest)


def _captions_of(manifest: UnitManifest, rows: pa.Table, *, texts: Mapping[str, str]) -> list[CaptionRow]:
    """The part of the caption list from which a unit of PAIRS was generated, reconstructed."""
    captions: list[CaptionRow] = [*captions_in(rows, manifest.ordinals())]
    for rejection in manifest.rejections:
        base = base_id(rejection.id)
        if base in texts:
            captions.append(Caption(id=base, ordinal=rejection.ordinal, text=texts[base]))
        else:
            is_lost = rejection.reason in ("forgotten", *_MODEL_REASONS)
            captions.append(replace(rejection, id=base, reason="withheld" if is_lost else rejection.reason))
    return sorted(captions, key=lambda caption: caption.ordinal)
