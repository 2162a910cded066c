"""Forgotten rows, and what was derived from them, are taken out of committed tables.

 what the list names ─ files without it ─ commits: PAIRS, TARGETS, LATENTS, others ─ again, until none is left

A unit keeps its name, its place and its account: what is taken out is rejected as `forgotten`, without its
id. Old versions keep the old files until they are erased (`pipelines.deletion.erasure`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.datasets.pairs import withhold_deleted
from pipelines.rejections import Rejection
from pipelines.sources.captions import Caption, captions_digest
from pipelines.storage.objects import IO_THREADS, read_bytes, write_once
from pipelines.tables.commits import WrittenUnit, read_written_unit, replace_units, restore_manifests
from pipelines.tables.committer import recover
from pipelines.tables.deletion_list import REDACTED_PREFIX, DeletionKeys, Entry, redacted_id
from pipelines.tables.manifest import UnitManifest, to_parquet
from pipelines.tables.table import (
    Snapshot,
    TableError,
    UnitFile,
    open_table,
    revised_name,
    unit_manifests,
    unit_records,
)

DELETION_ORDER: Final = ("pairs", "targets", "latents", "duplicates", "fingerprints")
"""Kinds of tables that rows are taken out of; what is derived comes first, so that it is never the last."""

_COLUMNS = {
    "pairs": ["id", "source_id"],
    "targets": ["id", "source_id"],
    "latents": ["id", "source_id"],
    "duplicates": ["id"],
    "fingerprints": ["id", "source_id", "image_sha256"],
}
_DERIVED = ("pairs", "targets")
"""Kinds whose ids are `<id of a row of LATENTS, or of a caption>#<draw>`."""
_MODEL_REASONS = ("not_finite", "crashed")
"""Reasons for which a caption that was on the list is no row of PAIRS."""
_MAX_ROUNDS = 20


@dataclass(frozen=True, kw_only=True)
class Match:
    """What of a unit is on the list.

    Attributes:
        file: of the unit.
        account: of the file.
        rows: positions in the file.
        rejections: positions among the account's rejections whose id or detail must go.
        ids: of the rows of LATENTS, or captions, behind all of these.
        entries: of the list, those that name them.
    """

    file: UnitFile
    account: UnitManifest
    rows: tuple[int, ...] = ()
    rejections: tuple[int, ...] = ()
    ids: frozenset[str] = frozenset()
    entries: frozenset[Entry] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.rows or self.rejections)


@dataclass(kw_only=True)
class Removal:
    """What was taken out of a table.

    Attributes:
        url: of the table.
        kind: of the table.
        before: its version before.
        after: and after.
        rows: taken out.
        rejections: rows that were rejected before and lost id and detail, by reason.
        units: whose files were replaced.
        notes: what could not be done.
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
    """A committed file, and the one that is to stand in its place."""

    old: UnitFile
    new: WrittenUnit
    match: Match


def supports_deletion(table: Snapshot) -> bool:
    """Whether rows can be taken out of a table of this kind.

    Not out of what figures are measured with: SAMPLES, REFERENCES, and the fingerprints of an evaluation,
    whose content is part of what DUPLICATES are.
    """
    kind = table.identity["kind"]
    return kind in DELETION_ORDER and not (kind == "fingerprints" and "evaluation" in table.identity)


def find_matches(table: Snapshot, forgotten: DeletionKeys) -> list[Match]:
    """The units that hold something on the list, and what.

    Raises:
        TableError: if rows cannot be taken out of such a table.
    """
    kind = table.identity["kind"]
    if not supports_deletion(table):
        raise TableError(
            f"{table.url} holds {kind}; rows are taken out of {', '.join(DELETION_ORDER)} of a run"
        )
    known = unit_manifests(table.url)

    def look_at(file: UnitFile) -> Match:
        account = known.get(file.unit) or read_written_unit(file.path).account
        rows = table.read_unit(file, _COLUMNS[kind]).to_pydict()
        return _match(file, account, rows, forgotten, derived=kind in _DERIVED)

    with ThreadPoolExecutor(IO_THREADS) as readers:
        return [match for match in readers.map(look_at, table.units) if match]


def count_matches(table: Snapshot, forgotten: DeletionKeys) -> int:
    """Rows of any table whose id or source id is on the list."""
    columns = [name for name in ("id", "source_id") if name in table.columns]

    def named(file: UnitFile) -> int:
        rows = table.read_unit(file, columns).to_pydict().values()
        return sum(bool(forgotten.named_by(ids=names, urls=names)) for names in zip(*rows, strict=True))

    with ThreadPoolExecutor(IO_THREADS) as readers:
        return sum(readers.map(named, table.units)) if columns else 0


def file_matches(table: Snapshot, rows: pa.Table, account: UnitManifest, forgotten: DeletionKeys) -> bool:
    """Whether a file of such a table, be it of an old version, holds something on the list."""
    kind = table.identity["kind"]
    file = UnitFile(unit=account.unit, path="", rows=rows.num_rows, size=0)
    told = rows.select(_COLUMNS[kind]).to_pydict()
    return bool(_match(file, account, told, forgotten, derived=kind in _DERIVED))


def delete_rows(urls: Sequence[str], forgotten: DeletionKeys) -> list[Removal]:
    """Take everything on the list out of the tables; returns what was done, for every table.

    Looks again after each round, until nothing is left: so units that other jobs commit meanwhile are seen,
    and whoever is killed goes on when called again.

    Raises:
        TableError: if other writers keep coming between.
    """
    removals = {}
    for url in urls:
        # Files of a round of DUPLICATES that was never committed stay what they are.
        (restore_manifests if open_table(url).identity["kind"] == "duplicates" else recover)(url)
        table = open_table(url)
        removals[url] = Removal(
            url=table.url, kind=table.identity["kind"], before=table.version, after=table.version
        )
    for _ in range(_MAX_ROUNDS):
        if not _round(removals, forgotten):
            return list(removals.values())
    raise TableError(
        f"after {_MAX_ROUNDS} rounds other jobs still add what is forgotten; run again when they have ended"
    )


def _round(removals: Mapping[str, Removal], forgotten: DeletionKeys) -> bool:
    """Plan all tables, then commit; whether there was anything to do."""
    tables = {url: open_table(url) for url in removals}
    by_kind = {
        kind: [url for url, removal in removals.items() if removal.kind == kind] for kind in DELETION_ORDER
    }
    changes: dict[str, list[_Change]] = {}
    for url in (*by_kind["latents"], *by_kind["duplicates"], *by_kind["fingerprints"]):
        changes[url] = [_rewritten(tables[url], match) for match in find_matches(tables[url], forgotten)]
    parents = _Parents([(tables[url], changes[url]) for url in by_kind["latents"]])
    for url in by_kind["targets"]:
        changes[url] = list(_plan_targets(tables[url], forgotten, parents=parents))
    for url in by_kind["pairs"]:
        changes[url] = list(_plan_pairs(tables[url], forgotten, parents=parents, removal=removals[url]))
    for url in (url for kind in DELETION_ORDER for url in by_kind[kind]):
        if changes[url] and not _commit(removals[url], changes[url]):
            return True
    return any(changes.values())


def _commit(removal: Removal, changes: Sequence[_Change]) -> bool:
    """Replace the files, and note it; False if another writer came first."""
    if not replace_units(removal.url, [(change.old, change.new) for change in changes]):
        return False
    removal.after = open_table(removal.url).version
    for change in changes:
        match = change.match
        removal.units.add(match.file.unit)
        removal.rows += len(match.rows)
        removal.rejections.update(match.account.rejections[place].reason for place in match.rejections)
    return True


def _match(
    file: UnitFile,
    account: UnitManifest,
    rows: Mapping[str, list[Any]],
    forgotten: DeletionKeys,
    *,
    derived: bool,
) -> Match:
    nothing = [None] * len(rows["id"])
    names_of = zip(rows["id"], rows.get("source_id", nothing), rows.get("image_sha256", nothing), strict=True)
    found = {
        place: entries
        for place, names in enumerate(names_of)
        if (entries := _entries(forgotten, *names, derived=derived))
    }
    spoken = {
        place: entries
        for place, rejection in enumerate(account.rejections)
        if (entries := _entries_of_rejection(forgotten, rejection, derived=derived))
    }
    ids = [*(rows["id"][place] for place in found), *(account.rejections[place].id for place in spoken)]
    return Match(
        file=file,
        account=account,
        rows=tuple(found),
        rejections=tuple(spoken),
        ids=frozenset(_base(id_) if derived else id_ for id_ in ids),
        entries=frozenset().union(*found.values(), *spoken.values()),
    )


def _entries(
    forgotten: DeletionKeys, id_: str, source_id: str | None, sha256: str | None, *, derived: bool
) -> set[Entry]:
    """What on the list names a row."""
    ids = {id_, source_id or id_, _base(id_) if derived else id_}
    # A caption list may have addresses for ids.
    return forgotten.named_by(ids=ids, urls=ids, hashes=() if sha256 is None else (sha256,))


def _entries_of_rejection(forgotten: DeletionKeys, rejection: Rejection, *, derived: bool) -> set[Entry]:
    if rejection.id.startswith(REDACTED_PREFIX) or rejection.reason == "withheld":
        return set()  # it says nothing, or only where in its shard the row stands
    addresses = [word for word in rejection.detail.split() if "://" in word]
    named = _entries(forgotten, rejection.id, None, None, derived=derived)
    return named | forgotten.named_by(urls=addresses)


def _base(id_: str) -> str:
    return id_.rpartition("#")[0] or id_


def _redacted(id_: str, *, derived: bool) -> str:
    """The id without what it tells; that of a draw still says which draw it is."""
    base, mark, draw = id_.rpartition("#") if derived else (id_, "", "")
    return f"{redacted_id(base)}{mark}{draw}"


def _rewritten(table: Snapshot, match: Match, *, source_digest: str | None = None) -> _Change:
    """Write the unit's file without what is on the list; nothing is committed yet."""
    derived = table.identity["kind"] in _DERIVED
    account, rows = match.account, _read(match.file)
    gone, ids, places = set(match.rows), rows["id"].to_pylist(), account.ordinals()
    taken = [
        Rejection(
            id=_redacted(ids[place], derived=derived),
            source=account.source,
            reason="forgotten",
            detail="",
            ordinal=places[place],
        )
        for place in match.rows
    ]
    kept = [
        replace(rejection, id=_redacted(rejection.id, derived=derived), detail="")
        if place in match.rejections
        else rejection
        for place, rejection in enumerate(account.rejections)
    ]
    fewer = replace(
        account,
        rows_written=account.rows_written - len(taken),
        rejections=(*kept, *taken),
        source_digest=source_digest or account.source_digest,
    )
    path = f"{table.url}/{revised_name(match.file.unit, fewer.to_json())}"
    mask = pa.array([place not in gone for place in range(rows.num_rows)], pa.bool_())
    write_once(path, to_parquet(rows.filter(mask), fewer))
    return _Change(old=match.file, new=read_written_unit(path), match=match)


def _read(file: UnitFile) -> pa.Table:
    return pq.read_table(pa.BufferReader(read_bytes(file.path)))


@dataclass(frozen=True, kw_only=True)
class _Parent:
    """The file that a unit of LATENTS will have."""

    path: str
    sha256: str
    replaced: bool


class _Parents:
    """LATENTS as they will be: TARGETS state the hash of the file that they were made of."""

    def __init__(self, planned: Sequence[tuple[Snapshot, Sequence[_Change]]]) -> None:
        self._tables = [table for table, _ in planned]
        self._files = [_planned_files(table, changes) for table, changes in planned]

    def of(self, targets: Snapshot, account: UnitManifest) -> list[_Parent]:
        """The files that a unit of TARGETS may have been made of."""
        return [
            files[account.source]
            for table, files in zip(self._tables, self._files, strict=True)
            if table.identity == targets.identity["latents"] and account.source in files
        ]

    def captions(self, ids: set[str]) -> dict[str, str]:
        """The captions of these rows, where there are such."""
        found: dict[str, str] = {}
        for table in self._tables if ids else ():
            for file in table.units:
                rows = table.read_unit(file, ["id", "caption"]).to_pydict()
                found |= {
                    id_: text for id_, text in zip(rows["id"], rows["caption"], strict=True) if id_ in ids
                }
        return found


def _planned_files(table: Snapshot, changes: Sequence[_Change]) -> dict[str, _Parent]:
    hashes = {record["unit"]: record["sha256"] for record in unit_records(table.url)}
    files = {
        file.unit: _Parent(
            path=file.path,
            sha256=hashes.get(file.unit) or read_written_unit(file.path).sha256,
            replaced=bool(file.mark),
        )
        for file in table.units
    }
    for change in changes:
        new = change.new
        files[change.old.unit] = _Parent(path=new.path, sha256=new.sha256, replaced=True)
    return files


def _plan_targets(table: Snapshot, forgotten: DeletionKeys, *, parents: _Parents) -> Iterator[_Change]:
    """The files of TARGETS that hold something on the list, or were made of a file that is replaced."""
    matches = {match.file.unit: match for match in find_matches(table, forgotten)}
    known = unit_manifests(table.url)
    for file in table.units:
        account = known.get(file.unit) or read_written_unit(file.path).account
        match = matches.get(file.unit)
        source_digest = _source_digest(file, match, account, parents.of(table, account))
        if match is not None or source_digest is not None:
            yield _rewritten(table, match or Match(file=file, account=account), source_digest=source_digest)


def _source_digest(
    file: UnitFile, match: Match | None, account: UnitManifest, candidates: Sequence[_Parent]
) -> str | None:
    """The hash of LATENTS that a unit of TARGETS should state, where it states that of a replaced file."""
    if account.source_digest in {parent.sha256 for parent in candidates}:
        return None
    fitting = (parent for parent in candidates if parent.replaced and _has_same_latents(file, match, parent))
    return next((parent.sha256 for parent in fitting), None)


def _has_same_latents(file: UnitFile, match: Match | None, parent: _Parent) -> bool:
    """Whether the rows of TARGETS that stay have the latents of a file of LATENTS."""
    rows = _read(file).select(["id", "latent"]).to_pydict()
    gone = set(match.rows) if match else set()
    there = pq.read_table(pa.BufferReader(read_bytes(parent.path)), columns=["id", "latent"]).to_pydict()
    latents = dict(zip(there["id"], there["latent"], strict=True))
    return all(
        latents.get(_base(id_)) == latent
        for place, (id_, latent) in enumerate(zip(rows["id"], rows["latent"], strict=True))
        if place not in gone
    )


def _plan_pairs(
    table: Snapshot, forgotten: DeletionKeys, *, parents: _Parents, removal: Removal
) -> Iterator[_Change]:
    """The files of PAIRS that hold something on the list, each with the digest of the list without it."""
    for match in find_matches(table, forgotten):
        account = match.account
        lost = {_base(one.id) for one in account.rejections if one.reason in _MODEL_REASONS}
        listed = _listed(account, _read(match.file), texts=parents.captions(lost))
        if captions_digest(listed) == account.source_digest:
            source_digest = captions_digest(withhold_deleted(listed, forgotten))
        else:
            source_digest = None
            removal.notes.append(
                f"the captions of unit {match.file.unit} cannot be put together again, so "
                "jobs.generate_pairs will want a new table"
            )
        yield _rewritten(table, match, source_digest=source_digest)


def _listed(account: UnitManifest, rows: pa.Table, *, texts: Mapping[str, str]) -> list[Caption | Rejection]:
    """The part of the caption list that a unit of PAIRS was drawn from."""
    told = rows.select(["source_id", "caption"]).to_pylist()
    listed: list[Caption | Rejection] = [
        Caption(id=row["source_id"], ordinal=place, text=row["caption"])
        for place, row in zip(account.ordinals(), told, strict=True)
    ]
    for rejection in account.rejections:
        base = _base(rejection.id)
        if base in texts:
            listed.append(Caption(id=base, ordinal=rejection.ordinal, text=texts[base]))
        elif rejection.reason in ("forgotten", *_MODEL_REASONS):
            listed.append(replace(rejection, id=base, reason="withheld"))
        else:
            listed.append(replace(rejection, id=base))
    return sorted(listed, key=lambda row: row.ordinal)
