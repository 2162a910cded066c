"""Reads the Parquet file that img2dataset writes beside each tar: one row per URL, failed ones included.

Samples are matched by key: the members' common name, with or without its folder. Integers are matched by
number, because keys lose their leading zeros in many programs. A sample that has no row of its own and no
.json is rejected: its scores would be lost, and the selection would not see them.
"""

import io
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from pipelines.rejections import Rejected
from pipelines.sources.parquet import CorruptParquetError, ParquetRows, RowBatch, column_values
from pipelines.sources.tar import TornShardError
from pipelines.storage.objects import open_object

_REASONS = {"failed_to_download": "download_failed", "failed_to_resize": "resize_failed"}
_BATCH_ROWS = 1 << 10
# That of 10,000 rows takes a few megabytes; one of a few kilobytes may unpack to any size.
_MAX_BYTES = 1 << 29


def sidecar_url(tar: str) -> str:
    """The URL of the sidecar of the tar at this URL."""
    return f"{tar.removesuffix('.tar')}.parquet"


def failure_of(row: dict[str, Any]) -> Rejected | None:
    """The rejection of a row of img2dataset's Parquet output by its status; None for a success."""
    status = str(row.get("status") or "success")
    if status == "success":
        return None
    return Rejected(_REASONS.get(status, "missing_sample"), str(row.get("error_message") or status))


class Sidecar:
    """The rows by key, in the file's order. They stay in columns: objects would take ten times the memory."""

    def __init__(self, table: pa.Table | None = None, *, fault: Rejected | None = None) -> None:
        self._fault = fault
        self._columns = {} if table is None else {name: table.column(name) for name in table.column_names}
        self._keys = [] if table is None else [_key(value) for value in column_values(table.column("key"))]
        self._rows: dict[str | int, int] = {}
        self._repeated: set[str | int] = set()
        for row, key in enumerate(self._keys):
            if key is not None and self._rows.setdefault(key, row) != row:
                self._repeated.add(key)
        self._sample_of: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._keys)

    def lists(self, sample: str) -> bool:
        """Whether there is a row of this sample's key."""
        return self._find(sample) is not None

    def metadata(self, sample: str) -> dict[str, Any]:
        """The values of a sample's row, nulls left out; empty if the sample has no row of its own."""
        row = self._find(sample)
        if (
            row is None
            or self._sample_of.setdefault(row, sample) != sample
            or self._keys[row] in self._repeated
        ):
            return {}
        return self._metadata(row)

    def mismatch(self, sample: str) -> Rejected | None:
        """The lack of a row of its own, after `metadata`; None if it has one or there is no sidecar."""
        if self._fault is not None:
            return self._fault
        row = self._find(sample)
        if row is None:
            return Rejected("bad_sidecar", f"does not list {sample}") if self._keys else None
        if self._sample_of.get(row, sample) != sample:
            return Rejected("bad_sidecar", f"{sample} and {self._sample_of[row]} have one row")
        if self._keys[row] in self._repeated:
            return Rejected("bad_sidecar", f"lists {sample} in several rows")
        return None

    def failures(self) -> list[Rejected]:
        """A rejection for each row whose status is a failure."""
        statuses = column_values(self._columns["status"]) if "status" in self._columns else []
        failed = [row for row, status in enumerate(statuses) if status not in (None, "success")]
        return [failure for row in failed if (failure := failure_of(self._metadata(row)))]

    def absent(self, arrived: set[str], *, tear: TornShardError | None) -> Iterator[tuple[str, Rejected]]:
        """Key and reason of each row that is not in the tar, which ended at `tear` unless it is complete."""
        found = set(map(self._find, arrived))
        for row, key in enumerate(self._keys):
            if key is None:
                yield f".parquet/{row:09d}", Rejected("bad_sidecar", "the row has no key")
            elif row != self._rows[key]:
                yield str(key), Rejected("duplicate_key", f"the sidecar lists {key} before")
            elif row not in found:
                yield str(key), failure_of(self._metadata(row)) or _missing(tear)

    def _find(self, sample: str) -> int | None:
        name = sample.rpartition("/")[2]
        candidates: list[str | int] = [sample, name]
        if name.isascii() and name.isdigit():
            candidates.append(int(name))
        return next((self._rows[key] for key in candidates if key in self._rows), None)

    def _metadata(self, row: int) -> dict[str, Any]:
        values = ((name, _value(column.slice(row, 1))) for name, column in self._columns.items())
        return {name: value for name, value in values if value is not None}


def read_sidecar(url: str) -> tuple[Sidecar, Rejected | None]:
    """The sidecar at `url`, and `bad_sidecar` if it is not Parquet or has no column `key`.

    It is empty if there is none, or it cannot be read.

    Raises:
        OSError: if the store fails.
    """
    try:
        with open_object(url) as file:
            data = file.read(_MAX_BYTES)
    except FileNotFoundError:
        return Sidecar(), None
    try:
        rows = ParquetRows(io.BytesIO(data))
        if "key" not in rows.schema.names:
            raise CorruptParquetError(f"no column 'key' among {', '.join(rows.schema.names)}")
        rows.check_size(_MAX_BYTES)
        batches, size = [], 0
        for part in rows.batches(rows.schema.names, batch_rows=_BATCH_ROWS):
            if not isinstance(part, RowBatch):
                raise CorruptParquetError(
                    f"rows {part.start} to {part.stop - 1} are unreadable: {part.fault}"
                )
            batches.append(part.record)
            size += part.record.nbytes
            if size > _MAX_BYTES:
                raise CorruptParquetError(f"more than {_MAX_BYTES} bytes when unpacked")
        table = pa.Table.from_batches(batches, rows.schema)
    except (CorruptParquetError, pa.ArrowException) as error:
        fault = Rejected("bad_sidecar", f"not readable as Parquet: {error}")
        return Sidecar(fault=fault), fault
    return Sidecar(table.combine_chunks()), None


def _missing(tear: TornShardError | None) -> Rejected:
    detail = "a success by the sidecar's account"
    return Rejected(tear.reason, f"{tear}; {detail}") if tear else Rejected("missing_sample", detail)


def _key(value: object) -> str | int | None:
    """A row's key; None if it has none of a kind that names of members can be compared with."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "surrogateescape")
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # pandas turns integers into floats where one is missing
    return value if isinstance(value, str | int) and not isinstance(value, bool) and value != "" else None


def _value(cell: pa.ChunkedArray) -> Any:  # noqa: ANN401 - any Parquet value
    (value,) = column_values(cell)
    is_text = pa.types.is_string(cell.type) or pa.types.is_large_string(cell.type)
    return None if is_text and isinstance(value, bytes) else value
