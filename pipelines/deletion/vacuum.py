"""Files in a table's folder that no version which somebody reads has: found, and deleted when asked."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any

import fsspec

from pipelines.deletion.erasure import SIBLINGS, old_sibling_files
from pipelines.storage.objects import absolute_url
from pipelines.storage.retry import with_retries
from pipelines.tables.table import Snapshot, open_table, unit_of


@dataclass(frozen=True, kw_only=True)
class UnreadFile:
    """A file that nobody reads.

    Attributes:
        path: of it.
        size: bytes.
        why: `replaced`: older versions have it. `uncommitted`: no version has it, and no job will commit it.
            `torn`: its writer was killed. `sibling`: replaced beside the table.
    """

    path: str
    size: int
    why: str


def unread_files(table: Snapshot, *, held: Collection[int], hours: float) -> list[UnreadFile]:
    """What of the folder of `table`, and of its siblings', neither it nor a held version reads.

    Files younger than `hours` are passed over: they may be about to be committed. Whole files of units that
    are not committed are none of these: the next run commits them (`pipelines.tables.committer.recover`).

    Args:
        table: at its newest version.
        held: versions that somebody reads, or will go on to read.
        hours: longer than any job takes from a file to its commit.

    Raises:
        TableError: if a held version cannot be opened.
    """
    before = time.time() - 3600 * hours
    read = {file.path for version in {table.version, *held} for file in _files_at(table, version)}
    committed = {file.unit for file in table.units}
    found = [
        UnreadFile(path=f"{table.url}/{name}", size=size, why=_why(name, committed))
        for name, size, modified in _listed(table.url)
        if modified < before and f"{table.url}/{name}" not in read
    ]
    return [*(file for file in found if file.why), *_of_siblings(table, before=before)]


def delete_files(files: Collection[UnreadFile]) -> None:
    """Delete them; one that is gone by now does no harm."""
    for file in files:
        filesystem, path = fsspec.core.url_to_fs(file.path)
        with_retries(file.path, partial(_remove, filesystem, path))


def _remove(filesystem: fsspec.AbstractFileSystem, path: str) -> None:
    try:
        filesystem.rm_file(path)
    except FileNotFoundError:
        return


def _why(name: str, committed: Collection[str]) -> str:
    if name.startswith("."):
        return "torn"
    return "replaced" if unit_of(name) in committed else ""


def _files_at(table: Snapshot, version: int) -> Iterator[Any]:
    # One that cannot be opened stops everything: nobody can say which files its reader needs.
    at = table if version == table.version else open_table(table.url, version=version)
    yield from at.units


def _of_siblings(table: Snapshot, *, before: float) -> Iterator[UnreadFile]:
    old = set(old_sibling_files(table.url))
    for sibling in SIBLINGS:
        location = f"{table.url}.{sibling}"
        for name, size, modified in _listed(location):
            path = f"{location}/{name}"
            if modified < before and (path in old or name.startswith(".")):
                yield UnreadFile(path=path, size=size, why="sibling" if path in old else "torn")


def _listed(location: str) -> list[tuple[str, int, float]]:
    """Name, bytes and time of the files in a folder, folders left out."""
    filesystem, path = fsspec.core.url_to_fs(absolute_url(location))
    filesystem.invalidate_cache()
    entries = with_retries(location, lambda: filesystem.ls(path, detail=True))
    return sorted(
        (entry["name"].rpartition("/")[2], int(entry["size"]), _modified(entry))
        for entry in entries
        if entry["type"] == "file"
    )


def _modified(entry: dict[str, Any]) -> float:
    """When a file was written, in seconds of the epoch; now, if the store does not say."""
    told = entry.get("mtime", entry.get("LastModified", entry.get("last_modified", entry.get("updated"))))
    if isinstance(told, datetime):
        return told.timestamp()
    if isinstance(told, str):
        return datetime.fromisoformat(told).timestamp()
    return float(told) if told is not None else time.time()
