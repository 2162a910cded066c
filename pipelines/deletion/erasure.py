"""Erases files that no newest version reads and that still hold deleted rows.

A replaced data file serves the versions before. Once it is erased they can be opened, and not be read.
Nobody reads old versions of `.rejects` and `.units`: their replaced files are erased, and so are their old
log entries, which may hold texts of rows.
"""

import json
import re

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.deletion.table_matches import file_matches
from pipelines.storage.objects import list_names, list_parquet, read_bytes
from pipelines.tables.commits import REWRITTEN_PREFIX
from pipelines.tables.deletion_list import DeletionKeys
from pipelines.tables.leases import active_writers
from pipelines.tables.manifest import read_manifest
from pipelines.tables.merging import MERGED_PREFIX
from pipelines.tables.table import Snapshot, live_names, open_delta
from pipelines.tables.unit_files import unit_of

SIBLINGS = ("rejects", "units")

_LOG_ENTRY = re.compile(r"(?P<version>\d{20})\..*(json|parquet|crc)")


def old_files(table: Snapshot, keys: DeletionKeys) -> list[str]:
    """The data files of committed units that only older versions read, and that have something on the list.

    `table` is at its newest version. Files of units that are not committed belong to other jobs.
    """
    live = {file.path for file in table.units}
    committed = {file.unit for file in table.units}
    paths = [f"{table.url}/{name}" for name in list_parquet(table.url) if unit_of(name) in committed]
    return [path for path in paths if path not in live and _holds_deleted(path, table, keys)]


def _holds_deleted(path: str, table: Snapshot, keys: DeletionKeys) -> bool:
    data = read_bytes(path)
    try:
        manifest, rows = read_manifest(data), pq.read_table(pa.BufferReader(data))
    except (ValueError, pa.ArrowException):
        return True  # nobody can tell that it does not
    return file_matches(table, rows, manifest, keys)


def old_sibling_files(url: str) -> list[str]:
    """The replaced files of a table's siblings."""
    paths = []
    for name in SIBLINGS:
        location = f"{url}.{name}"
        live, logged = set(live_names(open_delta(location))), _logged_names(location)
        old = (file for file in list_parquet(location) if file not in live)
        # A file that is neither in the log nor named as a rewrite is about to be committed by another job; so
        # is a merged one, as long as somebody writes the table.
        prefixes = (REWRITTEN_PREFIX,) if active_writers(url) else (REWRITTEN_PREFIX, MERGED_PREFIX)
        paths += [f"{location}/{file}" for file in old if file in logged or file.startswith(prefixes)]
    return paths


def erase_files(url: str, paths: list[str]) -> None:
    """Delete files of a table and its siblings, and then the siblings' log entries of earlier versions.

    Raises:
        OSError: if the store refuses.
    """
    for path in paths:
        filesystem, path_there = fsspec.core.url_to_fs(path)
        filesystem.rm_file(path_there)
    for name in SIBLINGS:
        _prune_log(f"{url}.{name}")


def _prune_log(location: str) -> None:
    """Reduce a log to a checkpoint of the newest version."""
    delta = open_delta(location)
    if delta.version() == 0:
        return
    # The checkpoint comes first: whoever is killed in between leaves a table that opens.
    delta.create_checkpoint()
    log = f"{location}/_delta_log"
    filesystem, folder = fsspec.core.url_to_fs(log)
    for name in list_names(log):
        found = _LOG_ENTRY.fullmatch(name)
        if found and int(found["version"]) < delta.version():
            filesystem.rm_file(f"{folder}/{name}")


def _logged_names(location: str) -> set[str]:
    """The files that were ever added, as far back as the log goes."""
    log = f"{location}/_delta_log"
    entries = (f"{log}/{name}" for name in list_names(log) if name.endswith(".json"))
    actions = (json.loads(line) for entry in entries for line in read_bytes(entry).splitlines() if line)
    return {action["add"]["path"] for action in actions if "add" in action}
