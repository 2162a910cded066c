"""Finds and deletes the files in a table's folder that no version in use reads."""

import time
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any

import fsspec

from pipelines.deletion.erasure import SIBLINGS, old_sibling_files
from pipelines.storage.retry import with_retries
from pipelines.tables.table import Snapshot, open_table
from pipelines.tables.unit_files import unit_of


@dataclass(frozen=True, kw_only=True)
class UnreadFile:
    """A file that nobody reads.

    Attributes:
        path: of it.
        size: bytes.
        why: `replaced`: older versions have it. `torn`: its writer was killed. `sibling`: replaced in
            `.rejects` or `.units`.
    """

    path: str
    size: int
    why: str


def unread_files(table: Snapshot, *, used: Collection[int], hours: float) -> list[UnreadFile]:
    """The files in the folders of `table` and its siblings that neither it nor a version in use reads.

    Files younger than `hours` are left out: they may be about to be committed. So are whole files of units
    that are not committed: the next run commits them (`pipelines.tables.committer.recover`).

    Args:
        table: at its newest version.
        used: versions that somebody reads, or will continue to read.
        hours: longer than any job needs from a file to its commit.

    Raises:
        TableError: if a version in use cannot be opened.
    """
    before = time.time() - 3600 * hours
    # A version in use that cannot be opened stops everything: nobody can tell which files its reader needs.
    versions = [table, *(open_table(table.url, version=version) for version in set(used) - {table.version})]
    read = {file.path for version in versions for file in version.units}
    committed = {file.unit for file in table.units}
    files = [
        UnreadFile(path=f"{table.url}/{name}", size=size, why=_why(name, committed))
        for name, size, modified in _list_files(table.url)
        if modified < before and f"{table.url}/{name}" not in read
    ]
    return [*(file for file in files if file.why), *_unread_siblings(table, before=before)]


def delete_files(files: Collection[UnreadFile]) -> None:
    """Delete files; one that is missing by now is no error."""
    for file in files:
        filesystem, path = fsspec.core.url_to_fs(file.path)
        # A retry whose first response was lost finds the file deleted.
        with suppress(FileNotFoundError):
            with_retries(file.path, partial(filesystem.rm_file, path))


def _why(name: str, committed: Collection[str]) -> str:
    if name.startswith("."):
        return "torn"
    return "replaced" if unit_of(name) in committed else ""


def _unread_siblings(table: Snapshot, *, before: float) -> Iterator[UnreadFile]:
    old = set(old_sibling_files(table.url))
    for sibling in SIBLINGS:
        location = f"{table.url}.{sibling}"
        for name, size, modified in _list_files(location):
            path = f"{location}/{name}"
            if modified < before and (path in old or name.startswith(".")):
                yield UnreadFile(path=path, size=size, why="sibling" if path in old else "torn")


def _list_files(location: str) -> list[tuple[str, int, float]]:
    """Name, bytes and time of the files in a folder, without folders."""
    filesystem, path = fsspec.core.url_to_fs(location)
    filesystem.invalidate_cache()
    entries = with_retries(location, lambda: filesystem.ls(path, detail=True))
    files = [entry for entry in entries if entry["type"] == "file"]
    return sorted((file["name"].rpartition("/")[2], int(file["size"]), _modified(file)) for file in files)


def _modified(entry: dict[str, Any]) -> float:
    """Time of a file's last change in seconds of the epoch; the present if the store does not say."""
    # Each filesystem names it in its own way: local, s3fs, adlfs, gcsfs.
    names = ("mtime", "LastModified", "last_modified", "updated")
    modified = next((entry[name] for name in names if entry.get(name) is not None), time.time())
    if isinstance(modified, str):
        modified = datetime.fromisoformat(modified)
    return modified.timestamp() if isinstance(modified, datetime) else float(modified)
