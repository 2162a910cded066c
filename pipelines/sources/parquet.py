"""Parquet files read row by row: memory does not grow with the file, and one bad string costs one row.

A row group whose bytes are corrupt costs its rows from there on; those of other row groups are read. A store
that does not answer is told from a corrupt file: that is no fault of the rows, and is raised as it came.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.storage.objects import open_object

# A column is read in pieces of this size, so that a row group of any size takes no more.
_BUFFER_BYTES = 1 << 20
_READ_AHEAD_BYTES = 8 << 20


class CorruptParquetError(ValueError):
    """Bytes that are no Parquet, or not what the file says of them."""


@dataclass(frozen=True, kw_only=True)
class RowBatch:
    """Consecutive rows, the first of which has the ordinal `start`."""

    start: int
    record: pa.RecordBatch

    @property
    def stop(self) -> int:
        """The ordinal after the last."""
        return self.start + int(self.record.num_rows)

    def values(self, name: str) -> list[Any]:
        """A column's values as Python has them; a text that is no UTF-8 as its bytes, nulls as None."""
        return _values(self.record.column(name))


@dataclass(frozen=True, kw_only=True)
class TornRows:
    """Ordinals [start, stop) that cannot be read, and why."""

    start: int
    stop: int
    detail: str


class ParquetRows:
    """An open Parquet file.

    Attributes:
        schema: as Arrow reads it.
        num_rows: by the file's own account.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = _ErrorRecorder(file)
        with self._told_apart():
            self._parquet = pq.ParquetFile(
                self._file, buffer_size=_BUFFER_BYTES, page_checksum_verification=True
            )
            self.schema: pa.Schema = self._parquet.schema_arrow
        self.num_rows: int = self._parquet.metadata.num_rows

    def batches(
        self, columns: Sequence[str], *, batch_rows: int, start: int = 0, stop: int | None = None
    ) -> Iterator[RowBatch | TornRows]:
        """The rows of the row groups that hold any of the ordinals [start, stop), in order.

        Raises:
            OSError: if the store does not answer.
        """
        end = self.num_rows if stop is None else stop
        for first, last, group in self._groups():
            if last > start and first < end:
                yield from self._group(group, columns, batch_rows=batch_rows, first=first, last=last)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """First ordinal of each row group, and the one after its last."""
        return [(first, last) for first, last, _ in self._groups()]

    def _groups(self) -> Iterator[tuple[int, int, int]]:
        """First ordinal, the one after the last, and number of each row group."""
        first = 0
        for group in range(self._parquet.num_row_groups):
            last = first + self._parquet.metadata.row_group(group).num_rows
            yield first, last, group
            first = last

    def _group(
        self, group: int, columns: Sequence[str], *, batch_rows: int, first: int, last: int
    ) -> Iterator[RowBatch | TornRows]:
        position = first
        try:
            for record in self._records(group, columns, batch_rows=batch_rows):
                yield RowBatch(start=position, record=record)
                position += record.num_rows
        except CorruptParquetError as error:
            yield TornRows(start=position, stop=last, detail=str(error))
            return
        if position < last:
            yield TornRows(start=position, stop=last, detail=f"row group {group} ends early")

    def _records(self, group: int, columns: Sequence[str], *, batch_rows: int) -> Iterator[pa.RecordBatch]:
        with self._told_apart():
            records = self._parquet.iter_batches(
                batch_size=batch_rows, row_groups=[group], columns=list(columns), use_threads=False
            )
        while True:
            with self._told_apart():
                record = next(records, None)
            if record is None:
                return
            yield record

    @contextmanager
    def _told_apart(self) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowException, OSError, ValueError) as error:
            if self._file.fault is not None:
                raise self._file.fault from None
            raise CorruptParquetError(str(error)) from None


@contextmanager
def open_parquet(url: str) -> Iterator[ParquetRows]:
    """The Parquet file at `url`, open for reading.

    Raises:
        CorruptParquetError: if it is none.
        OSError: if it is not there, or the store does not answer.
    """
    with open_object(url, ahead=_READ_AHEAD_BYTES) as file:
        yield ParquetRows(file)


class _ErrorRecorder(io.RawIOBase):
    """A file that remembers what its store raised: Arrow's own complaints have the same types."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.fault: Exception | None = None

    def read(self, size: int = -1, /) -> bytes:
        with self._watch():
            return self._file.read(size)

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        with self._watch():
            return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    @contextmanager
    def _watch(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.fault = error
            raise


def _values(column: pa.Array) -> list[Any]:
    kind = column.type
    if pa.types.is_dictionary(kind):
        return _values(column.cast(kind.value_type))
    try:
        values: list[Any] = column.to_pylist()
    except (ValueError, OverflowError, pa.ArrowException):
        # A text that is no UTF-8, which Parquet does not enforce, or a date that Python does not know.
        return [_value(column.slice(row, 1)) for row in range(len(column))]
    return values


def _value(cell: pa.Array) -> Any:  # noqa: ANN401 - as the column has it
    try:
        return cell.to_pylist()[0]
    except (ValueError, OverflowError, pa.ArrowException):
        if pa.types.is_string(cell.type) or pa.types.is_large_string(cell.type):
            return cell.cast(pa.large_binary()).to_pylist()[0]
        return None
