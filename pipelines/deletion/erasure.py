"""Files that no newest version reads, and that still tell what was forgotten: named, and erased when asked.

A replaced data file serves the versions before. Once it is gone they can be opened, and not be read. Siblings
have no versions that anybody reads: what was replaced there goes, and so does the log of it, whose entries
may hold texts of the rows.
"""

from __future__ import annotations

import json
import re

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.deletion.rewrite import file_matches
from pipelines.storage.objects import absolute_url, list_names, list_parquet, read_bytes
from pipelines.tables.commits import REWRITTEN_PREFIX, live_names
from pipelines.tables.deletion_list import DeletionKeys
from pipelines.tables.manifest import read_manifest
from pipelines.tables.table import Snapshot, open_delta, unit_of

SIBLINGS = ("rejects", "units")

_LOG_ENTRY = re.compile(r"(?P<version>\d{20})\..*(json|parquet|crc)")


def old_files(table: Snapshot, forgotten: DeletionKeys) -> list[str]:
    """The data files of committed units that the newest version does not read, and that hold forgotten rows.

    `table` is at its newest version. Files of units that are not committed are another job's.
    """
    live = {file.path for file in table.units}
    committed = {file.unit for file in table.units}
    names = [name for name in list_parquet(table.url) if unit_of(name) in committed]
    paths = [f"{table.url}/{name}" for name in names]
    return [path for path in paths if path not in live and _holds_deleted(path, table, forgotten)]


def _holds_deleted(path: str, table: Snapshot, forgotten: DeletionKeys) -> bool:
    data = read_bytes(path)
    try:
        account, rows = read_manifest(data), pq.read_table(pa.BufferReader(data))
    except (ValueError, pa.ArrowException):
        return True  # nobody can say that it does not
    return file_matches(table, rows, account, forgotten)


def old_sibling_files(url: str) -> list[str]:
    """The files that were replaced in the siblings of a table."""
    found = []
    for name in SIBLINGS:
        location = f"{absolute_url(url)}.{name}"
        live, logged = set(live_names(open_delta(location))), _logged(location)
        # One that is neither in the log nor ours is about to be committed by another job.
        gone = (
            file for file in list_parquet(location) if file in logged or file.startswith(REWRITTEN_PREFIX)
        )
        found += [f"{location}/{file}" for file in gone if file not in live]
    return found


def erase_files(url: str, paths: list[str]) -> None:
    """Delete files of a table and its siblings, and then what the siblings' logs say of earlier versions.

    Raises:
        OSError: if the store refuses.
    """
    for path in paths:
        filesystem, place = fsspec.core.url_to_fs(path)
        filesystem.rm_file(place)
    for name in SIBLINGS:
        _prune_log(f"{absolute_url(url)}.{name}")


def _prune_log(location: str) -> None:
    """Leave a checkpoint of the newest version, and nothing before it."""
    delta = open_delta(location)
    if delta.version() == 0:
        return
    delta.create_checkpoint()
    log = f"{location}/_delta_log"
    filesystem, folder = fsspec.core.url_to_fs(log)
    for name in list_names(log):
        found = _LOG_ENTRY.fullmatch(name)
        if found and int(found["version"]) < delta.version():
            filesystem.rm_file(f"{folder}/{name}")


def _logged(location: str) -> set[str]:
    """The files that were ever added, as far back as the log goes."""
    log = f"{location}/_delta_log"
    entries = (f"{log}/{name}" for name in list_names(log) if name.endswith(".json"))
    actions = (json.loads(line) for entry in entries for line in read_bytes(entry).splitlines() if line)
    return {action["add"]["path"] for action in actions if "add" in action}
