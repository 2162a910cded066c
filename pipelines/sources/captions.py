"""Lists of captions: .txt, .tsv, .csv, .jsonl or Parquet, one caption a row.

A .txt has one caption a line. A .tsv has a header line, columns parted by tabs and no quoting, as its media
type says and PartiPrompts needs; a .csv may quote. A blank line is a row too, and is rejected: ordinals
follow the lines.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.rejections import Rejected, Rejection, printable
from pipelines.sources import SourceError
from pipelines.sources.settings import CaptionSettings
from pipelines.sources.text import clean_caption
from pipelines.storage.objects import open_object

_CHUNK_BYTES = 1 << 20
_READ_AHEAD_BYTES = 8 << 20
# A longer line is cut here: as text it is cut much further by the settings, as JSON or CSV it is a bad row.
_MAX_LINE_BYTES = 4 << 20
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


@dataclass(frozen=True)
class _RawRow:
    """A row before it is judged: values as the format gave them, or what is wrong with it."""

    caption: str | bytes | None = None
    id: str | bytes | int | float | None = None
    fault: Rejected | None = None


def read_captions(
    url: str, settings: CaptionSettings, *, start: int = 0, stop: int | None = None
) -> Iterator[Caption | Rejection]:
    """Rows `start` <= ordinal < `stop` of a list, in order, each as a caption or as a rejection.

    The list is read from its beginning whatever `start` is, so that a repeated id is found in every range;
    with an `id_column` all ids before `stop` are held in memory.

    Raises:
        SourceError: if the list is not there, is of no known format, or lacks a column.
        ValueError: if the range is not one.
        OSError: if the store keeps failing while the list is read.
    """
    if start < 0 or (stop is not None and stop < start):
        raise ValueError(f"start {start} and stop {stop} given; 0 <= start <= stop is accepted")
    read = _reader_of(url)
    source = url.rstrip("/").rpartition("/")[2]
    seen: set[str] = set()
    try:
        with _open(url) as file:
            for ordinal, raw in enumerate(itertools.islice(read(file, settings), stop)):
                row = _judge(raw, settings, ordinal=ordinal, seen=seen, source=source)
                if ordinal >= start:
                    yield row
    except (SourceError, csv.Error, pa.ArrowException) as error:
        raise SourceError(f"{url}: {error}") from None


def _open(url: str) -> IO[bytes]:
    try:
        return open_object(url, ahead=_READ_AHEAD_BYTES)
    except FileNotFoundError:
        raise SourceError("no such file") from None
    except Exception as error:
        raise SourceError(f"cannot be opened: {error}") from error


def captions_digest(rows: Iterable[Caption | Rejection]) -> str:
    """SHA-256 of a range of rows: ids, texts and what was rejected; 64 hexadecimal digits."""
    state = hashlib.sha256()
    for row in rows:
        kind, text = ("caption", row.text) if isinstance(row, Caption) else ("rejection", row.reason)
        state.update(json.dumps([kind, row.id, text]).encode())
    return state.hexdigest()


def _judge(
    raw: _RawRow, settings: CaptionSettings, *, ordinal: int, seen: set[str], source: str
) -> Caption | Rejection:
    name = f"{ordinal:09d}"
    try:
        if raw.fault is not None:
            raise raw.fault
        if settings.id_column is not None:
            name = _name(raw.id, column=settings.id_column)
            if name in seen:
                raise Rejected("duplicate_key", f"{name} came before")
            seen.add(name)
        text = clean_caption(raw.caption, max_chars=settings.max_caption_chars)
        return Caption(id=name, ordinal=ordinal, text=text)
    except Rejected as verdict:
        return verdict.record(id=name, source=source, ordinal=ordinal)


def _name(given: object, *, column: str) -> str:
    if isinstance(given, bytes):
        given = given.decode("utf-8", "surrogateescape")
    if isinstance(given, float) and given.is_integer():
        given = int(given)  # pandas makes floats of integers where one is missing
    if isinstance(given, bool) or not isinstance(given, str | int) or given == "":
        raise Rejected("bad_row", f"no id in {column!r}: {given!r}")
    name = printable(str(given))
    if len(name) > _MAX_ID_CHARS:
        raise Rejected(
            "bad_row", f"an id of {len(name)} characters in {column!r}; {_MAX_ID_CHARS} are allowed"
        )
    return name


_Reader = Callable[[IO[bytes], CaptionSettings], Iterator[_RawRow]]


def _reader_of(url: str) -> _Reader:
    for endings, reader in _READERS.items():
        if url.lower().endswith(endings):
            return reader
    known = ", ".join(ending for endings in _READERS for ending in endings)
    raise SourceError(f"{url} is of no known format; the name must end in one of {known}")


def _read_txt(file: IO[bytes], settings: CaptionSettings) -> Iterator[_RawRow]:
    if settings.id_column is not None:
        raise SourceError("a .txt has no columns, so leave id_column out")
    return (_RawRow(caption=line) for line in _lines(file))


def _read_tsv(file: IO[bytes], settings: CaptionSettings) -> Iterator[_RawRow]:
    lines = _lines(file)
    header = [column.decode("utf-8", "replace") for column in next(lines, b"").split(b"\t")]
    caption, identity = _places(header, settings)
    for line in lines:
        fields = line.split(b"\t")
        yield _RawRow(caption=_at(fields, caption), id=_at(fields, identity))


def _read_csv(file: IO[bytes], settings: CaptionSettings) -> Iterator[_RawRow]:
    # Bytes that are no UTF-8 pass through as surrogates, and are judged with the caption they stand in.
    rows = csv.reader(line.decode("utf-8", "surrogateescape") + "\n" for line in _lines(file))
    caption, identity = _places(next(rows, []), settings)
    while True:
        try:
            fields = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield _RawRow(fault=Rejected("bad_row", str(error)))
        else:
            yield _RawRow(caption=_at(fields, caption), id=_at(fields, identity))


def _read_jsonl(file: IO[bytes], settings: CaptionSettings) -> Iterator[_RawRow]:
    for line in _lines(file):
        try:
            yield _from_json(line, settings)
        except UnicodeDecodeError as error:
            yield _RawRow(fault=Rejected("bad_encoding", str(error)))
        except (ValueError, RecursionError) as error:
            yield _RawRow(fault=Rejected("bad_row", str(error)))


def _from_json(line: bytes, settings: CaptionSettings) -> _RawRow:
    if not line.strip():
        return _RawRow(caption="")
    row = json.loads(line.decode())
    if not isinstance(row, dict):
        raise ValueError(f"a JSON {type(row).__name__}, not an object")
    caption = row.get(settings.caption_column)
    if caption is not None and not isinstance(caption, str):
        raise ValueError(f"{settings.caption_column!r} is a JSON {type(caption).__name__}, not a string")
    return _RawRow(caption=caption, id=_get(row, settings.id_column))


def _read_parquet(file: IO[bytes], settings: CaptionSettings) -> Iterator[_RawRow]:
    try:
        table = pq.ParquetFile(file)
    except (pa.ArrowException, ValueError) as error:
        raise SourceError(f"not readable as Parquet: {error}") from None
    _places(table.schema_arrow.names, settings)
    columns = [settings.caption_column, *([settings.id_column] if settings.id_column else [])]
    for batch in table.iter_batches(batch_size=_BATCH_ROWS, columns=columns):
        values = {name: _values(batch.column(name), name=name) for name in columns}
        for index, caption in enumerate(values[settings.caption_column]):
            yield _RawRow(
                caption=caption, id=values[settings.id_column][index] if settings.id_column else None
            )


_READERS: Mapping[tuple[str, ...], _Reader] = {
    (".txt",): _read_txt,
    (".tsv",): _read_tsv,
    (".csv",): _read_csv,
    (".jsonl", ".ndjson"): _read_jsonl,
    (".parquet",): _read_parquet,
}


def _values(column: pa.Array, *, name: str) -> list[Any]:
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        numbers: list[Any] = column.to_pylist()
        return numbers
    try:
        # As bytes, so that one string that is no UTF-8 costs one row: Parquet does not enforce it.
        texts: list[Any] = column.cast(kind).cast(pa.large_binary()).to_pylist()
    except pa.ArrowException:
        raise SourceError(f"column {name!r} is of type {kind}; text is accepted") from None
    return texts


def _places(header: list[str], settings: CaptionSettings) -> tuple[int, int | None]:
    """Positions of the caption and of the id."""
    names = [name.strip() for name in header]
    for column in (settings.caption_column, settings.id_column):
        if column is not None and column not in names:
            raise SourceError(f"no column {column!r}; it has {', '.join(map(repr, names))}")
    return names.index(settings.caption_column), (
        None if settings.id_column is None else names.index(settings.id_column)
    )


def _at(fields: list[Any], place: int | None) -> Any:  # noqa: ANN401 - text or bytes, as the format has it
    return None if place is None or place >= len(fields) else fields[place]


def _get(row: dict[str, Any], column: str | None) -> Any:  # noqa: ANN401 - any JSON value
    return None if column is None else row.get(column)


def _lines(file: IO[bytes]) -> Iterator[bytes]:
    """The lines without their ends, each cut to a bounded length, in bounded memory."""
    line = bytearray()
    first = file.read(_CHUNK_BYTES).removeprefix(codecs.BOM_UTF8)
    for chunk in itertools.chain([first], iter(lambda: file.read(_CHUNK_BYTES), b"")):
        *ends, rest = chunk.split(b"\n")
        for end in ends:
            line += end[: _MAX_LINE_BYTES - len(line)]
            yield bytes(line).removesuffix(b"\r")
            line.clear()
        line += rest[: _MAX_LINE_BYTES - len(line)]
    if line:
        yield bytes(line).removesuffix(b"\r")
