"""Reads Parquet files row by row: bounded memory, and one invalid string costs one row.

A corrupt row group costs its rows from the corruption on; other row groups are read. Errors of the store are
not errors of the file: they are raised unchanged. Dictionaries and views are read as the type that they stand
for. Joins leave several columns of one name: the first is read, and rows in which a later one has another
value are not.
"""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.rejections import Rejected
from pipelines.storage.objects import open_object

# A column is read in buffers of this size, so that memory does not depend on the size of row groups.
_BUFFER_BYTES = 1 << 20


class CorruptParquetError(ValueError):
    """Bytes that are no Parquet file, or contradict its metadata."""


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
        """A column's values, as of `column_values`."""
        return column_values(self.record.column(name))


@dataclass(frozen=True, kw_only=True)
class UnreadableRows:
    """Ordinals [start, stop) that cannot be read, and why: `torn_shard` or `bad_metadata`."""

    start: int
    stop: int
    fault: Rejected


class ParquetRows:
    """An open Parquet file.

    Attributes:
        schema: the Arrow schema, each name once, without dictionaries and views.
        num_rows: according to the footer.
    """

    def __init__(self, file: IO[bytes]) -> None:
        with _distinguish_errors():
            self._parquet = pq.ParquetFile(file, buffer_size=_BUFFER_BYTES, page_checksum_verification=True)
            self.schema = _plain_schema(self._parquet.schema_arrow)
        self.num_rows: int = self._parquet.metadata.num_rows

    def batches(
        self, columns: Sequence[str], *, batch_rows: int, start: int = 0, stop: int | None = None
    ) -> Iterator[RowBatch | UnreadableRows]:
        """The rows of the row groups that contain any of the ordinals [start, stop), in order.

        Raises:
            OSError: if the store fails.
        """
        end = self.num_rows if stop is None else stop
        for group, span in enumerate(self.spans):
            if span[1] > start and span[0] < end:
                yield from self._batches_of_group(group, columns, batch_rows=batch_rows, span=span)

    def check_size(self, max_bytes: int) -> None:
        """Check the size when decompressed, by the footer; what is encoded as repeated may still grow.

        Raises:
            CorruptParquetError: if it is above `max_bytes`.
        """
        metadata = self._parquet.metadata
        size = sum(metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups))
        if size > max_bytes:
            raise CorruptParquetError(f"{size} bytes when unpacked, {max_bytes} are allowed")

    @property
    def spans(self) -> list[tuple[int, int]]:
        """The first ordinal of each row group, and the one after its last."""
        metadata = self._parquet.metadata
        rows = (metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
        return list(itertools.pairwise(itertools.accumulate(rows, initial=0)))

    def _batches_of_group(
        self, group: int, columns: Sequence[str], *, batch_rows: int, span: tuple[int, int]
    ) -> Iterator[RowBatch | UnreadableRows]:
        position, last = span
        try:
            with _distinguish_errors():
                for record in self._parquet.iter_batches(
                    batch_size=batch_rows, row_groups=[group], columns=list(columns), use_threads=False
                ):
                    yield from _parts(record, start=position)
                    position += record.num_rows
        except CorruptParquetError as error:
            yield UnreadableRows(start=position, stop=last, fault=Rejected("torn_shard", str(error)))
            return
        if position < last:
            fault = Rejected("torn_shard", f"row group {group} ends early")
            yield UnreadableRows(start=position, stop=last, fault=fault)


def _plain_schema(schema: pa.Schema) -> pa.Schema:
    fields = {field.name: field for field in reversed(schema)}
    return pa.schema([pa.field(name, _plain_type(fields[name].type)) for name in dict.fromkeys(schema.names)])


def _plain_type(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_dictionary(kind):
        return _plain_type(kind.value_type)
    return {pa.string_view(): pa.large_string(), pa.binary_view(): pa.large_binary()}.get(kind, kind)


def _plain(column: pa.Array) -> pa.Array:
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column.cast(_plain_type(column.type))


def _parts(record: pa.RecordBatch, *, start: int) -> Iterator[RowBatch | UnreadableRows]:
    """The rows, those apart in which columns of one name differ."""
    columns: dict[str, pa.Array] = {}
    differing: dict[int, str] = {}
    for name, column in zip(record.schema.names, map(_plain, record.columns), strict=True):
        if columns.setdefault(name, column) is not column:
            differing |= dict.fromkeys(_differing_rows(columns[name], column), name)
    plain = pa.RecordBatch.from_pydict(columns)
    begin = 0
    for row, name in sorted(differing.items()):
        if row > begin:
            yield RowBatch(start=start + begin, record=plain.slice(begin, row - begin))
        fault = Rejected("bad_metadata", f"several columns are named {name}, and their values differ")
        yield UnreadableRows(start=start + row, stop=start + row + 1, fault=fault)
        begin = row + 1
    if begin < len(plain):
        yield RowBatch(start=start + begin, record=plain.slice(begin))


def _differing_rows(first: pa.Array, later: pa.Array) -> list[int]:
    """The rows in which `later` has a value that is not that of `first`; NaN counts as no value."""
    pairs = zip(column_values(first), column_values(later), strict=True)
    return [
        row for row, (one, other) in enumerate(pairs) if one != other and other is not None and other == other
    ]


@contextmanager
def open_parquet(url: str) -> Iterator[ParquetRows]:
    """The Parquet file at `url`, open for reading.

    Raises:
        CorruptParquetError: if it is not Parquet.
        OSError: if it does not exist, or the store fails.
    """
    with open_object(url) as file:
        yield ParquetRows(file)


@contextmanager
def _distinguish_errors() -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as error:
        # For corrupt bytes Arrow raises plain OSErrors too. An error of the file passes through it unchanged:
        # a `StoreFailure`, or an error of the operating system, which has a number.
        if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
            raise
        raise CorruptParquetError(str(error)) from None


def column_values(column: pa.Array | pa.ChunkedArray) -> list[Any]:
    """A column's values as Python objects: invalid UTF-8 as bytes, dates that Python cannot hold as None."""
    try:
        values: list[Any] = column.to_pylist()
    except (ValueError, OverflowError, pa.ArrowException):
        # Parquet does not enforce UTF-8: the values are converted one by one, so that one costs one row.
        return [_value(column.slice(row, 1)) for row in range(len(column))]
    return values


def _value(cell: pa.Array | pa.ChunkedArray) -> Any:  # noqa: ANN401 - any Parquet value
    try:
        return cell.to_pylist()[0]
    except (ValueError, OverflowError, pa.ArrowException):
        is_text = pa.types.is_string(cell.type) or pa.types.is_large_string(cell.type)
        return cell.cast(pa.large_binary()).to_pylist()[0] if is_text else None
