"""Damage to tables that readers, verification or repair are expected to find."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.tables.table import live_names, open_delta

WRITE = pq.write_table


def last_entry(location: str) -> Path:
    """The newest entry of a log."""
    return max(Path(location, "_delta_log").glob("*.json"))


def edit_log(location: str, edit: Callable[[dict[str, Any]], dict[str, Any] | None]) -> None:
    """Change each action of a log's newest entry; None leaves it out."""
    entry = last_entry(location)
    actions = [edit(json.loads(line)) for line in entry.read_text().splitlines()]
    entry.write_text("".join(json.dumps(action) + "\n" for action in actions if action is not None))


def edit_rows(location: str, edit: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Change each row of a sibling in its own file, which stays well-formed."""
    for name in live_names(open_delta(location)):
        path = Path(location, name)
        rows = pq.read_table(path)
        edited = [edit(row) for row in rows.to_pylist()]
        pq.write_table(pa.Table.from_pylist(edited, schema=rows.schema), path, write_page_checksum=True)


def without_page_checksums(rows: pa.Table, buffer: io.BytesIO, **options: Any) -> None:
    """Write a Parquet file as version 0.1 did; replaces `pyarrow.parquet.write_table`."""
    WRITE(rows, buffer, **(options | {"write_page_checksum": False}))
