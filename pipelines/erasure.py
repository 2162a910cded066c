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

from pipelines.account import read_account
from pipelines.commits import RESTATED, live_names
from pipelines.forgetting import holds
from pipelines.forgotten import Forgotten
from pipelines.storage import absolute, names_in, parquet_in, read_bytes
from pipelines.tables import Snapshot, delta_at, unit_of

SIBLINGS = ("rejects", "units")

_LOG_ENTRY = re.compile(r"(?P<version>\d{20})\..*(json|parquet|crc)")


def old_files(table: Snapshot, forgotten: Forgotten) -> list[str]:
    """The data files of committed units that the newest version does not read, and that hold forgotten rows.

    `table` is at its newest version. Files of units that are not committed are another job's.
    """
    live = {file.path for file in table.units}
    committed = {file.unit for file in table.units}
    names = [name for name in parquet_in(table.url) if unit_of(name) in committed]
    paths = [f"{table.url}/{name}" for name in names]
    return [path for path in paths if path not in live and _tells(path, table, forgotten)]


def _tells(path: str, table: Snapshot, forgotten: Forgotten) -> bool:
    data = read_bytes(path)
    try:
        account, rows = read_account(data), pq.read_table(pa.BufferReader(data))
    except (ValueError, pa.ArrowException):
        return True  # nobody can say that it does not
    return holds(table, rows, account, forgotten)


def old_sibling_files(url: str) -> list[str]:
    """The files that were replaced in the siblings of a table."""
    found = []
    for name in SIBLINGS:
        location = f"{absolute(url)}.{name}"
        live, logged = set(live_names(delta_at(location))), _logged(location)
        # One that is neither in the log nor ours is about to be committed by another job.
        gone = (file for file in parquet_in(location) if file in logged or file.startswith(RESTATED))
        found += [f"{location}/{file}" for file in gone if file not in live]
    return found


def erase(url: str, paths: list[str]) -> None:
    """Delete files of a table and its siblings, and then what the siblings' logs say of earlier versions.

    Raises:
        OSError: if the store refuses.
    """
    for path in paths:
        filesystem, place = fsspec.core.url_to_fs(path)
        filesystem.rm_file(place)
    for name in SIBLINGS:
        _prune_log(f"{absolute(url)}.{name}")


def _prune_log(location: str) -> None:
    """Leave a checkpoint of the newest version, and nothing before it."""
    delta = delta_at(location)
    if delta.version() == 0:
        return
    delta.create_checkpoint()
    log = f"{location}/_delta_log"
    filesystem, folder = fsspec.core.url_to_fs(log)
    for name in names_in(log):
        found = _LOG_ENTRY.fullmatch(name)
        if found and int(found["version"]) < delta.version():
            filesystem.rm_file(f"{folder}/{name}")


def _logged(location: str) -> set[str]:
    """The files that were ever added, as far back as the log goes."""
    log = f"{location}/_delta_log"
    entries = (f"{log}/{name}" for name in names_in(log) if name.endswith(".json"))
    actions = (json.loads(line) for entry in entries for line in read_bytes(entry).splitlines() if line)
    return {action["add"]["path"] for action in actions if "add" in action}
