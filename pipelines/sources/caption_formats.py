"""Reads the rows of caption lists: .txt, .tsv, .csv, .jsonl, .json or Parquet, one caption per row.

A .txt has one caption per line. A .tsv has a header line and tab-separated columns without quoting, as its
media type states and PartiPrompts requires; a .csv may quote. A blank line is a row too, and is rejected, so
that ordinals follow the lines. Several columns of the captions' name must agree in each row.
"""

import csv
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any, Final, TypeAlias

import pyarrow as pa

from pipelines.rejections import Rejected
from pipelines.sources import SourceError
from pipelines.sources.caption_columns import CaptionFields, find_columns
from pipelines.sources.caption_json import read_json, read_jsonl
from pipelines.sources.layouts import is_text
from pipelines.sources.parquet import CorruptParquetError, ParquetRows, RowBatch
from pipelines.sources.settings import CaptionSettings
from pipelines.sources.text_files import read_lines, read_records

_BATCH_ROWS = 1024

Reader: TypeAlias = Callable[[IO[bytes], CaptionSettings], Iterator[CaptionFields]]


def _read_txt(file: IO[bytes], settings: CaptionSettings) -> Iterator[CaptionFields]:
    if settings.id_column is not None:
        raise SourceError("a .txt has no columns, so leave id_column out")
    return (CaptionFields(caption=line) for line in read_lines(file))


def _read_tsv(file: IO[bytes], settings: CaptionSettings) -> Iterator[CaptionFields]:
    lines = read_lines(file)
    row_of = _columns(next(lines, b"").decode("utf-8", "replace").split("\t"), settings)
    return (row_of(line.split(b"\t")) for line in lines)


def _read_csv(file: IO[bytes], settings: CaptionSettings) -> Iterator[CaptionFields]:
    # Invalid UTF-8 passes through the parser as surrogates, and then costs only the caption it occurs in.
    records = read_records(line.decode("utf-8", "surrogateescape") for line in read_lines(file))
    header = next(records, [])
    if isinstance(header, csv.Error):
        raise SourceError(f"the header: {header}")
    row_of = _columns(header, settings)
    for record in records:
        if isinstance(record, csv.Error):
            yield CaptionFields(fault=Rejected("bad_row", str(record)))
        else:
            yield row_of(record)


def _read_parquet(file: IO[bytes], settings: CaptionSettings) -> Iterator[CaptionFields]:
    try:
        rows = ParquetRows(file)
    except CorruptParquetError as error:
        raise SourceError(f"not readable as Parquet: {error}") from None
    columns = find_columns(rows.schema.names, settings)
    for name in columns.names:
        kind = rows.schema.field(name).type
        if not is_text(kind) and (name == columns.caption or not _is_number(kind)):
            raise SourceError(f"column {name!r} is of type {kind}; text is accepted")
    for part in rows.batches(columns.names, batch_rows=_BATCH_ROWS):
        if isinstance(part, RowBatch):
            values = [part.values(name) for name in columns.names]
            yield from (CaptionFields(*fields) for fields in zip(*values, strict=True))
        else:
            yield from itertools.repeat(CaptionFields(fault=part.fault), part.stop - part.start)


READERS: Final[Mapping[str, Reader]] = {
    ".txt": _read_txt,
    ".tsv": _read_tsv,
    ".csv": _read_csv,
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".parquet": _read_parquet,
}
"""The reader of each ending of a name."""


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _columns(header: list[str], settings: CaptionSettings) -> Callable[[Sequence[Any]], CaptionFields]:
    """A function from the fields of a row to the row.

    Raises:
        SourceError: if a column is missing.
    """
    names = [name.strip() for name in header]
    columns = find_columns(names, settings)
    captions = [index for index, name in enumerate(names) if name == columns.caption]
    id_ = None if columns.id is None else names.index(columns.id)

    def row_of(fields: Sequence[Any]) -> CaptionFields:
        texts = {fields[index]: None for index in captions if index < len(fields) and fields[index]}
        if len(texts) > 1:
            detail = f"several columns are named {columns.caption}, and their values differ"
            return CaptionFields(fault=Rejected("bad_row", detail))
        return CaptionFields(caption=next(iter(texts), _field(fields, captions[0])), id=_field(fields, id_))

    return row_of


def _field(fields: Sequence[Any], index: int | None) -> Any:  # noqa: ANN401 - text or bytes
    return None if index is None or index >= len(fields) else fields[index]
