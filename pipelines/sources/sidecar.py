"""The Parquet file that img2dataset leaves beside each tar: one row a URL, the failed ones too."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.storage.objects import open_object

_READ_AHEAD_BYTES = 8 << 20

FAILURES = {"failed_to_download": "download_failed", "failed_to_resize": "resize_failed"}
"""img2dataset's words for a row that has no picture, and ours."""


class SidecarError(ValueError):
    """A sidecar that is there but cannot be read."""


class Sidecar:
    """The rows by key, in the file's order. They stay columns: as objects a shard's would take tenfold."""

    def __init__(self, table: pa.Table | None = None) -> None:
        self._columns = {} if table is None else {name: table.column(name) for name in table.column_names}
        keys = [] if table is None else _values(table.column("key"))
        self._rows = {str(key): row for row, key in enumerate(keys)}

    def __len__(self) -> int:
        return len(self._rows)

    def metadata(self, key: str) -> dict[str, Any]:
        """What is known of a row, nulls left out; empty for an unknown key."""
        if key not in self._rows:
            return {}
        row = self._rows[key]
        values = ((name, _value(column.slice(row, 1))) for name, column in self._columns.items())
        return {name: value for name, value in values if value is not None}

    def failed(self) -> Iterator[tuple[str, str]]:
        """Reason and detail of each row that has no picture by its own account."""
        if "status" not in self._columns:
            return
        statuses = _values(self._columns["status"])
        for key, row in self._rows.items():
            status = statuses[row]
            if status not in (None, "success"):
                detail = self.metadata(key).get("error_message") or status
                yield FAILURES.get(status, "missing_sample"), str(detail)

    def absent(self, arrived: set[str], *, torn: bool) -> Iterator[tuple[str, str, str]]:
        """Key, reason and detail of each row that did not arrive in the tar."""
        for key in self._rows:
            if key in arrived:
                continue
            row = self.metadata(key)
            status = row.get("status") or "success"
            if status == "success":
                yield key, "torn_shard" if torn else "missing_sample", "a success by the sidecar's account"
            else:
                detail = row.get("error_message") or status
                yield key, FAILURES.get(status, "missing_sample"), str(detail)


def read_sidecar(url: str) -> Sidecar | None:
    """The sidecar at `url`, None where there is none.

    Raises:
        SidecarError: if it is no Parquet file or has no column `key`.
        OSError: if the store does not answer.
    """
    try:
        with open_object(url, ahead=_READ_AHEAD_BYTES) as file:
            data = file.read()
    except FileNotFoundError:
        return None
    try:
        table = pq.read_table(io.BytesIO(data)).combine_chunks()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise SidecarError(f"not readable as Parquet: {error}") from None
    if "key" not in table.column_names:
        raise SidecarError(f"no column 'key' among {', '.join(table.column_names)}")
    return Sidecar(table)


def _value(cell: pa.ChunkedArray) -> Any:  # noqa: ANN401 - as the column has it
    try:
        return _values(cell)[0]
    except (ValueError, OverflowError, pa.ArrowException):  # such as a date that Python does not know
        return None


def _values(column: pa.ChunkedArray) -> list[Any]:
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        # One bad string must not hide the others: Parquet does not enforce UTF-8.
        return [_text(value) for value in column.cast(pa.large_binary()).to_pylist()]
    values: list[Any] = column.to_pylist()
    return values


def _text(value: bytes | None) -> str | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return None
