"""Finds the rows and rejections of tables that a deletion list names."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa

from pipelines.rejections import Rejection
from pipelines.storage.objects import IO_THREADS
from pipelines.tables.commits import read_written_unit
from pipelines.tables.compacted import compaction_of
from pipelines.tables.deletion_list import REDACTED_PREFIX, DeletionKeys, Entry
from pipelines.tables.manifest import UnitManifest
from pipelines.tables.table import Snapshot, TableError
from pipelines.tables.unit_files import UnitFile

DELETION_ORDER: Final = ("pairs", "targets", "latents", "duplicates", "fingerprints")
"""Kinds of tables that rows are deleted from, in the order of their commits.

Derived ones come first, so that a deletion killed in between leaves no derived row without its origin.
"""

_COLUMNS = {
    "pairs": ["id", "source_id"],
    "targets": ["id", "source_id"],
    "latents": ["id", "source_id"],
    "duplicates": ["id"],
    "fingerprints": ["id", "source_id", "image_sha256"],
}
_DERIVED = ("pairs", "targets")


@dataclass(frozen=True, kw_only=True)
class Match:
    """The rows and rejections of a unit that are on the list.

    Attributes:
        file: of the unit.
        manifest: of the file.
        rows: indices in the file.
        rejections: indices of the manifest's rejections whose id or detail must be removed.
        ids: of the rows of LATENTS, or captions, behind all of these.
        entries: of the list, those that name them.
    """

    file: UnitFile
    manifest: UnitManifest
    rows: tuple[int, ...] = ()
    rejections: tuple[int, ...] = ()
    ids: frozenset[str] = frozenset()
    entries: frozenset[Entry] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.rows or self.rejections)


def supports_deletion(table: Snapshot) -> bool:
    """Whether rows can be deleted from a table of this kind.

    Not from tables that metrics depend on: SAMPLES, REFERENCES, and the fingerprints of an evaluation, whose
    content is part of the identity of DUPLICATES.
    """
    kind = table.identity["kind"]
    return kind in DELETION_ORDER and not (kind == "fingerprints" and "evaluation" in table.identity)


def deletion_rank(table: Snapshot) -> tuple[int, bool]:
    """Tables of lower rank come first: by kind, and compacted ones before what they were compacted from."""
    identity = table.identity
    return DELETION_ORDER.index(identity["kind"]), compaction_of(identity) is None


def is_derived(table: Snapshot) -> bool:
    """Whether a table's ids are `<id of a row of LATENTS, or of a caption>#<draw>`."""
    return table.identity["kind"] in _DERIVED


def base_id(id_: str) -> str:
    """The id without the number of the draw."""
    return id_.rpartition("#")[0] or id_


def find_matches(table: Snapshot, keys: DeletionKeys) -> list[Match]:
    """The units that have something on the list.

    Raises:
        TableError: if rows cannot be deleted from such a table.
    """
    if not supports_deletion(table):
        kind = table.identity["kind"]
        raise TableError(f"{table.url} holds {kind}; rows are deleted from {', '.join(DELETION_ORDER)}")
    manifests = table.manifests()

    def match(file: UnitFile) -> Match:
        # A unit whose manifest is not restored yet has it in its own file.
        manifest = manifests.get(file.unit) or read_written_unit(file.path).manifest
        kind = table.identity["kind"]
        return _match(kind, file, manifest, table.read_unit(file, _COLUMNS[kind]), keys)

    with ThreadPoolExecutor(IO_THREADS) as readers:
        return [found for found in readers.map(match, table.units) if found]


def count_matches(table: Snapshot, keys: DeletionKeys) -> int:
    """Rows of a table of any kind whose id or source id is on the list."""
    columns = [name for name in ("id", "source_id") if name in table.columns]

    def count(file: UnitFile) -> int:
        rows = table.read_unit(file, columns).to_pydict().values()
        return sum(bool(keys.find(ids=names, urls=names)) for names in zip(*rows, strict=True))

    with ThreadPoolExecutor(IO_THREADS) as readers:
        return sum(readers.map(count, table.units)) if columns else 0


def file_matches(table: Snapshot, rows: pa.Table, manifest: UnitManifest, keys: DeletionKeys) -> bool:
    """Whether a file of such a table, even of an old version, has something on the list."""
    file = UnitFile(unit=manifest.unit, path="", rows=rows.num_rows, size=0)
    return bool(_match(table.identity["kind"], file, manifest, rows, keys))


def matching_rows(table: Snapshot, rows: pa.Table, keys: DeletionKeys) -> list[int]:
    """Indices of the rows of such a table that are on the list."""
    records = rows.select(_COLUMNS[table.identity["kind"]]).to_pylist()
    found = (_entries_of_row(keys, row, derived=is_derived(table)) for row in records)
    return [index for index, entries in enumerate(found) if entries]


def _match(kind: str, file: UnitFile, manifest: UnitManifest, rows: pa.Table, keys: DeletionKeys) -> Match:
    derived, records = kind in _DERIVED, rows.select(_COLUMNS[kind]).to_pylist()
    of_rows = [_entries_of_row(keys, row, derived=derived) for row in records]
    of_rejections = [_entries_of_rejection(keys, row, derived=derived) for row in manifest.rejections]
    rows_found = tuple(index for index, entries in enumerate(of_rows) if entries)
    rejections_found = tuple(index for index, entries in enumerate(of_rejections) if entries)
    ids = [records[index]["id"] for index in rows_found]
    ids += [manifest.rejections[index].id for index in rejections_found]
    return Match(
        file=file,
        manifest=manifest,
        rows=rows_found,
        rejections=rejections_found,
        ids=frozenset(base_id(id_) if derived else id_ for id_ in ids),
        entries=frozenset().union(*of_rows, *of_rejections),
    )


def _entries_of_row(keys: DeletionKeys, row: Mapping[str, Any], *, derived: bool) -> set[Entry]:
    """The entries that name a row of `_COLUMNS`, of which no kind of table has all."""
    id_, sha256 = row["id"], row.get("image_sha256")
    ids = {id_, row.get("source_id") or id_, base_id(id_) if derived else id_}
    # Ids are compared as URLs too: some caption lists have URLs for ids.
    return keys.find(ids=ids, urls=ids, hashes=() if sha256 is None else (sha256,))


def _entries_of_rejection(keys: DeletionKeys, rejection: Rejection, *, derived: bool) -> set[Entry]:
    # The first has no id left; the second has no more than the row's position in its shard.
    if rejection.id.startswith(REDACTED_PREFIX) or rejection.reason == "withheld":
        return set()
    urls = [word for word in rejection.detail.split() if "://" in word]
    return _entries_of_row(keys, {"id": rejection.id}, derived=derived) | keys.find(urls=urls)
