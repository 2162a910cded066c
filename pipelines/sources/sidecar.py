"""Reads the Parquet file that img2dataset writes beside each tar: one row per URL, failed ones included."""

import io
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.rejections import Rejected
from pipelines.sources.parquet import column_values
from pipelines.storage.objects import open_object

_REASONS = {"failed_to_download": "download_failed", "failed_to_resize": "resize_failed"}


def failure_of(row: dict[str, Any]) -> Rejected | None:
    """Why a row of img2dataset's Parquet output has no image: its status, with the message as detail."""
    status = row.get("status") or "success"
    if status == "success":
        return None
    return Rejected(_REASONS.get(status, "missing_sample"), str(row.get("error_message") or status))


class Sidecar:
    """The rows by key, in the file's order. They stay in columns: objects would take ten times the memory."""

    def __init__(self, table: pa.Table | None = None) -> None:
        self._columns = {} if table is None else {name: table.column(name) for name in table.column_names}
        keys = [] if table is None else _values(table.column("key"))
        self._rows = {str(key): row for row, key in enumerate(keys)}

    def __len__(self) -> int:
        return len(self._rows)

    def metadata(self, key: str) -> dict[str, Any]:
        """The values of a row, nulls left out; empty for an unknown key."""
        if key not in self._rows:
            return {}
        row = self._rows[key]
        values = ((name, _values(column.slice(row, 1))[0]) for name, column in self._columns.items())
        return {name: value for name, value in values if value is not None}

    def failures(self) -> list[Rejected]:
        """Why each row whose status is a failure has no image."""
        statuses = _values(self._columns["status"]) if "status" in self._columns else [None] * len(self)
        failed = [key for key, row in self._rows.items() if statuses[row] not in (None, "success")]
        return [failure for key in failed if (failure := failure_of(self.metadata(key)))]

    def absent(self, arrived: set[str], *, tear: Exception | None) -> Iterator[tuple[str, Rejected]]:
        """Key and reason of each row that is not in the tar, which ended at `tear` unless it is complete."""
        for key in self._rows:
            if key not in arrived:
                yield key, failure_of(self.metadata(key)) or _missing(tear)


def read_sidecar(url: str) -> tuple[Sidecar, Rejected | None]:
    """The sidecar at `url`, and `bad_sidecar` if it is not Parquet or has no column `key`.

    It is empty if there is none, or it cannot be read.

    Raises:
        OSError: if the store fails.
    """
    try:
        with open_object(url) as file:
            data = file.read()
    except FileNotFoundError:
        return Sidecar(), None
    try:
        table = pq.read_table(io.BytesIO(data)).combine_chunks()
    except (pa.ArrowException, OSError, ValueError) as error:
        return Sidecar(), Rejected("bad_sidecar", f"not readable as Parquet: {error}")
    if "key" not in table.column_names:
        detail = f"no column 'key' among {', '.join(table.column_names)}"
        return Sidecar(), Rejected("bad_sidecar", detail)
    return Sidecar(table), None


def _missing(tear: Exception | None) -> Rejected:
    detail = "a success by the sidecar's account"
    return Rejected("torn_shard", f"{tear}; {detail}") if tear else Rejected("missing_sample", detail)


def _values(column: pa.ChunkedArray) -> list[Any]:
    values = column_values(column)
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return [None if isinstance(value, bytes) else value for value in values]
    return values
