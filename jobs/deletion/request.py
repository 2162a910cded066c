"""Reads deletion requests, and finds the rows that they name in a run's shards and tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import PurePath

from jobs.deletion.lineage import RunFiles
from pipelines.deletion.lookup import LookupResult, look_up_shards
from pipelines.deletion.table_matches import deletion_rank, find_matches, supports_deletion
from pipelines.sources import SourceError
from pipelines.sources.webdataset import list_shards
from pipelines.storage.objects import StorageError
from pipelines.tables.deletion_list import (
    ENTRY_KINDS,
    DeletionKeys,
    DeletionRequestError,
    Entry,
    EntryKind,
    read_entries,
    sha256_key,
)
from pipelines.tables.table import Snapshot, TableError, open_table


@dataclass(frozen=True, kw_only=True)
class RequestFile:
    """One file of entries to delete.

    Attributes:
        kind: of its entries.
        name: of the file, without its folder.
        entries: keys, each with the number of the first line that has it.
    """

    kind: EntryKind
    name: str
    entries: Mapping[bytes, int]


@dataclass(kw_only=True)
class RequestMatches:
    """Rows of a run that match a request.

    Attributes:
        lookup: result of the search in shards.
        rows: matching rows and rejections of each table, by path.
        ids: of rows of LATENTS and of captions.
        entries: of the request, those that match.
    """

    lookup: LookupResult
    rows: dict[str, tuple[int, int]] = field(default_factory=dict)
    ids: set[str] = field(default_factory=set)
    entries: set[Entry] = field(default_factory=set)

    def keys(self, kind: EntryKind) -> set[bytes]:
        """The matching keys of one kind."""
        return {key for entry_kind, key in self.entries if entry_kind == kind}


def read_request(paths: Mapping[str, Sequence[str]]) -> list[RequestFile]:
    """The files of a request, by the kind of their entries.

    Raises:
        DeletionRequestError: if there is no file, or one cannot be read; names the option.
    """
    files = []
    for kind in ENTRY_KINDS:
        for path in paths[kind]:
            try:
                entries = read_entries(path, kind=kind)
            except DeletionRequestError as error:
                raise DeletionRequestError(f"--{kind} {error}") from None
            files.append(RequestFile(kind=kind, name=PurePath(path).name, entries=entries))
    if not files:
        options = ", ".join(f"--{kind}" for kind in ENTRY_KINDS)
        raise DeletionRequestError(f"{options}: at least one of them is needed, with a file of entries")
    return files


def request_keys(files: Sequence[RequestFile]) -> DeletionKeys:
    """The keys of all files."""
    urls, hashes, ids = (
        frozenset(key for file in files if file.kind == kind for key in file.entries) for kind in ENTRY_KINDS
    )
    return DeletionKeys(urls=urls, hashes=hashes, ids=ids)


def id_keys(ids: Iterable[str]) -> DeletionKeys:
    """The keys of row ids."""
    return DeletionKeys(ids=frozenset(map(sha256_key, ids)))


@dataclass(frozen=True, kw_only=True)
class DeletionTarget:
    """The run that rows are deleted from.

    Attributes:
        files: of the run.
        tables: that rows are deleted from, by path, derived ones first.
        other_tables: of ours, by path.
        shards_url: of its shards, which need not exist.
        source: short name of the shards, the first part of row ids.
    """

    files: RunFiles
    tables: Mapping[str, Snapshot]
    other_tables: Mapping[str, Snapshot]
    shards_url: str
    source: str

    @classmethod
    def open(cls, url: str, *, shards_url: str, source: str) -> DeletionTarget:
        """The run at `url`.

        Raises:
            StorageError: if there is no run.
        """
        files = RunFiles(url)
        if not files.paths:
            raise StorageError(f"--out {url}: there is no run; the deletion list is part of a run")
        tables: dict[str, Snapshot] = {}
        for path in files.tables:
            with suppress(TableError):  # a Delta table of another program
                tables[path] = open_table(f"{files.url}/{path}")
        supported = [path for path, table in tables.items() if supports_deletion(table)]
        supported.sort(key=lambda path: deletion_rank(tables[path]))
        return cls(
            files=files,
            tables={path: tables.pop(path) for path in supported},
            other_tables=tables,
            shards_url=shards_url,
            source=source,
        )

    def find(self, keys: DeletionKeys) -> RequestMatches:
        """Find the matches of `keys` in the shards, if they exist, and in the tables."""
        lookup = self._look_up(keys)
        matches = RequestMatches(lookup=lookup, ids=set(lookup.ids), entries=set(lookup.entries))
        # LATENTS know addresses, derived tables ids alone: ids that one pass finds are sought by the next.
        before = -1
        while len(matches.ids) > before:
            before = len(matches.ids)
            named = keys | id_keys(matches.ids)
            for path, table in self.tables.items():
                units = find_matches(table, named)
                rows = sum(len(unit.rows) for unit in units)
                matches.rows[path] = (rows, sum(len(unit.rejections) for unit in units))
                matches.ids.update(*(unit.ids for unit in units))
                matches.entries.update(*(unit.entries for unit in units))
        return matches

    def _look_up(self, keys: DeletionKeys) -> LookupResult:
        if not keys.urls and not keys.hashes:
            return LookupResult()
        try:
            return look_up_shards(list_shards(self.shards_url), keys, source=self.source)
        except (SourceError, OSError):
            # Tables know addresses too; the receipt records that no shard was looked up.
            return LookupResult()
