"""Reads lists of captions: .txt, .tsv, .csv, .jsonl or Parquet, one caption per row.

A .txt has one caption per line. A .tsv has a header line and tab-separated columns without quoting, as its
media type states and PartiPrompts requires; a .csv may quote. A blank line is a row too, and is rejected, so
that ordinals follow the lines. Several columns of the captions' name must agree in each row.
"""

import csv
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

import pyarrow as pa

from pipelines.rejections import Rejected, Rejection, printable
from pipelines.sources import SourceError, check_range
from pipelines.sources.layouts import is_text
from pipelines.sources.parquet import CorruptParquetError, ParquetRows, RowBatch
from pipelines.sources.settings import CaptionSettings
from pipelines.sources.text import clean_caption
from pipelines.sources.text_files import read_lines, read_records
from pipelines.storage.objects import open_object

_BATCH_ROWS = 1024
_MAX_ID_CHARS = 256


@dataclass(frozen=True, kw_only=True)
class Caption:
    """One caption.

    Attributes:
        id: the row's own id, or its ordinal as nine digits; unique in the list.
        ordinal: position in the list, from 0.
        text: one line, not empty.
    """

    id: str
    ordinal: int
    text: str


CaptionRow = Caption | Rejection
"""A row of a caption list: usable, or rejected."""


@dataclass(frozen=True)
class _RawRow:
    """An unchecked row: the format's own values, or why it cannot be parsed."""

    caption: str | bytes | None = None
    id: str | bytes | int | float | None = None
    fault: Rejected | None = None


def read_captions(
    url: str, settings: CaptionSettings, *, start: int = 0, stop: int | None = None
) -> Iterator[Caption | Rejection]:
    """Rows `start` <= ordinal < `stop` of a list, in order, each as a caption or a rejection.

    The list is always read from its beginning, so that a repeated id is found in every range; with an
    `id_column` all ids before `stop` are held in memory.

    Raises:
        SourceError: if the list does not exist, has an unknown format, or lacks a column.
        ValueError: if the range is invalid.
        OSError: if the store keeps failing while the list is read.
    """
    check_range(start, stop)
    read = _READERS.get(f".{url.lower().rpartition('.')[2]}")
    if read is None:
        raise SourceError(f"{url} is of no known format; the name must end in one of {', '.join(_READERS)}")
    source = url.rstrip("/").rpartition("/")[2]
    seen: set[str] = set()
    try:
        with _open(url) as file:
            for ordinal, raw in enumerate(itertools.islice(read(file, settings), stop)):
                row = _check(raw, settings, ordinal=ordinal, seen=seen, source=source)
                if ordinal >= start:
                    yield row
    except (SourceError, csv.Error, pa.ArrowException) as error:
        raise SourceError(f"{url}: {error}") from None


def captions_digest(rows: Iterable[Caption | Rejection]) -> str:
    """SHA-256 of a range of rows: ids, texts and reasons of rejections; 64 hexadecimal digits."""
    state = hashlib.sha256()
    for row in rows:
        kind, text = ("caption", row.text) if isinstance(row, Caption) else ("rejection", row.reason)
        state.update(json.dumps([kind, row.id, text]).encode())
    return state.hexdigest()


def _open(url: str) -> IO[bytes]:
    try:
        return open_object(url)
    except FileNotFoundError:
        raise SourceError("no such file") from None
    except Exception as error:
        raise SourceError(f"cannot be opened: {error}") from error


def _check(
    raw: _RawRow, settings: CaptionSettings, *, ordinal: int, seen: set[str], source: str
) -> Caption | Rejection:
    name = f"{ordinal:09d}"
    try:
        if raw.fault is not None:
            raise raw.fault
        if settings.id_column is not None:
            name = _row_id(raw.id, column=settings.id_column)
            if name in seen:
                raise Rejected("duplicate_key", f"{name} came before")
            seen.add(name)
        text = clean_caption(raw.caption, max_chars=settings.max_caption_chars)
        return Caption(id=name, ordinal=ordinal, text=text)
    except Rejected as rejected:
        return rejected.record(id=name, source=source, ordinal=ordinal)


def _row_id(given: object, *, column: str) -> str:
    if isinstance(given, bytes):
        given = given.decode("utf-8", "surrogateescape")
    if isinstance(given, float) and given.is_integer():
        given = int(given)  # pandas turns integers into floats where one is missing
    if isinstance(given, bool) or not isinstance(given, str | int) or given == "":
        raise Rejected("bad_row", f"no id in {column!r}: {given!r}")
    name = printable(str(given))
    if len(name) > _MAX_ID_CHARS:
        raise Rejected(
            "bad_row", f"an id of {len(name)} characters in {column!r}; {_MAX_ID_CHARS} are allowed"
        )
    return name


_Reader = Callable[[IO[bytes], CaptionSettings], Iterator[_RawRow]]


def _read_txt(file: IO[bytes], settings: CaptionSettings) -> Iterator[_RawRow]:
    if settings.id_column is not None:
        raise SourceError("a .txt has no columns, so leave id_column out")
    return (_RawRow(caption=line) for line in read_lines(file))


def _read_tsv(file: IO[bytes], settings: CaptionSettings) -> Iterator[_RawRow]:
    lines = read_lines(file)
    row_of = _columns(next(lines, b"").decode("utf-8", "replace").split("\t"), settings)
    return (row_of(line.split(b"\t")) for line in lines)


def _read_csv(file: IO[bytes], settings: CaptionSettings) -> Iterator[_RawRow]:
    # Invalid UTF-8 passes through the parser as surrogates, and then costs only the caption it occurs in.
    records = read_records(line.decode("utf-8", "surrogateescape") for line in read_lines(file))
    header = next(records, [])
    if isinstance(header, csv.Error):
        raise SourceError(f"the header: {header}")
    row_of = _columns(header, settings)
    for record in records:
        if isinstance(record, csv.Error):
            yield _RawRow(fault=Rejected("bad_row", str(record)))
        else:
            yield row_of(record)


def _read_jsonl(file: IO[bytes], settings: CaptionSettings) -> Iterator[_RawRow]:
    for line in read_lines(file):
        try:
            yield _parse_json(line, settings)
        except UnicodeDecodeError as error:
            yield _RawRow(fault=Rejected("bad_encoding", str(error)))
        except (ValueError, RecursionError) as error:
            yield _RawRow(fault=Rejected("bad_row", str(error)))


def _parse_json(line: bytes, settings: CaptionSettings) -> _RawRow:
    if not line.strip():
        return _RawRow(caption="")
    row = json.loads(line.decode())
    if not isinstance(row, dict):
        raise ValueError(f"a JSON {type(row).__name__}, not an object")
    caption = row.get(settings.caption_column)
    if caption is not None and not isinstance(caption, str):
        raise ValueError(f"{settings.caption_column!r} is a JSON {type(caption).__name__}, not a string")
    return _RawRow(caption=caption, id=None if settings.id_column is None else row.get(settings.id_column))


def _read_parquet(file: IO[bytes], settings: CaptionSettings) -> Iterator[_RawRow]:
    try:
        rows = ParquetRows(file)
    except CorruptParquetError as error:
        raise SourceError(f"not readable as Parquet: {error}") from None
    _check_columns(rows.schema.names, settings)
    names = [name for name in (settings.caption_column, settings.id_column) if name is not None]
    for name in names:
        kind = rows.schema.field(name).type
        if not is_text(kind) and (name == settings.caption_column or not _is_number(kind)):
            raise SourceError(f"column {name!r} is of type {kind}; text is accepted")
    for part in rows.batches(names, batch_rows=_BATCH_ROWS):
        if isinstance(part, RowBatch):
            columns = [part.values(name) for name in names]
            yield from (_RawRow(*fields) for fields in zip(*columns, strict=True))
        else:
            yield from itertools.repeat(_RawRow(fault=part.fault), part.stop - part.start)


_READERS: Mapping[str, _Reader] = {
    ".txt": _read_txt,
    ".tsv": _read_tsv,
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".parquet": _read_parquet,
}


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _check_columns(names: Sequence[str], settings: CaptionSettings) -> None:
    for column in (settings.caption_column, settings.id_column):
        if column is not None and column not in names:
            raise SourceError(f"no column {column!r}; it has {', '.join(map(repr, names))}")


def _columns(header: list[str], settings: CaptionSettings) -> Callable[[Sequence[Any]], _RawRow]:
    """A function from the fields of a row to the row.

    Raises:
        SourceError: if a column is missing.
    """
    names = [name.strip() for name in header]
    _check_columns(names, settings)
    captions = [index for index, name in enumerate(names) if name == settings.caption_column]
    id_ = None if settings.id_column is None else names.index(settings.id_column)

    def row_of(fields: Sequence[Any]) -> _RawRow:
        texts = {fields[index]: None for index in captions if index < len(fields) and fields[index]}
        if len(texts) > 1:
            detail = f"several columns are named {settings.caption_column}, and their values differ"
            return _RawRow(fault=Rejected("bad_row", detail))
        return _RawRow(caption=next(iter(texts), _field(fields, captions[0])), id=_field(fields, id_))

    return row_of


def _field(fields: Sequence[Any], index: int | None) -> Any:  # noqa: ANN401 - text or bytes
    return None if index is None or index >= len(fields) else fields[index]
