"""Reads lists of captions of any format of `caption_formats`: checks each row, and names it."""

import csv
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import IO

import numpy as np
import pyarrow as pa

from pipelines.rejections import Rejected, Rejection, printable
from pipelines.sources import SourceError, check_range
from pipelines.sources.caption_columns import CaptionFields
from pipelines.sources.caption_formats import READERS
from pipelines.sources.lazy_rows import LazyRows
from pipelines.sources.repeated_ids import RepeatedIds
from pipelines.sources.settings import CaptionSettings
from pipelines.sources.text import clean_caption
from pipelines.storage.objects import open_object

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


def read_captions(
    url: str, settings: CaptionSettings, *, start: int = 0, stop: int | None = None
) -> Iterator[Caption | Rejection]:
    """Rows `start` <= ordinal < `stop` of a list, in order, each as a caption or a rejection.

    The list is always read from its beginning, so that a repeated id is found in every range; with an
    `id_column` all ids before `stop` are held in memory.

    Raises:
        SourceError: if the list does not exist, cannot be parsed, has an unknown format, or lacks a column.
        ValueError: if the range is invalid.
        OSError: if the store keeps failing while the list is read.
    """
    check_range(start, stop)
    source, seen = _source_of(url), set[str]()

    def came_before(_: int, id_: str) -> bool:
        known = id_ in seen
        seen.add(id_)
        return known

    for ordinal, raw in enumerate(itertools.islice(_fields(url, settings), stop)):
        row = _check(raw, settings, ordinal=ordinal, source=source, came_before=came_before)
        if ordinal >= start:
            yield row


def list_captions(url: str, settings: CaptionSettings, *, limit: int | None = None) -> LazyRows[CaptionRow]:
    """The first `limit` rows of a list, counted now and read range by range as they are used.

    In memory are a bit a row, with an `id_column`, and the range that is read.

    Raises:
        SourceError: as `read_captions`.
        OSError: if the store keeps failing while the list is read.
    """
    repeated, count = RepeatedIds(), 0
    for raw in itertools.islice(_fields(url, settings), limit):
        if settings.id_column is not None and raw.fault is None:
            with suppress(Rejected):
                repeated.add(count, _row_id(raw.id, column=settings.id_column))
        count += 1
    repeats = repeated.repeats(count=count)
    return LazyRows(partial(_rows_from, url, settings, repeats), count=count)


def _rows_from(url: str, settings: CaptionSettings, repeats: np.ndarray, start: int) -> Iterator[CaptionRow]:
    """The rows from `start` on, of a list whose repeated ids are known (see `RepeatedIds.repeats`)."""
    source = _source_of(url)
    for ordinal, raw in enumerate(itertools.islice(_fields(url, settings), start, None), start):
        yield _check(raw, settings, ordinal=ordinal, source=source, came_before=partial(_has_bit, repeats))


def _has_bit(bits: np.ndarray, ordinal: int, _: str) -> bool:
    return bool(bits[ordinal >> 3] >> (7 - (ordinal & 7)) & 1)


def _source_of(url: str) -> str:
    return url.rstrip("/").rpartition("/")[2]


def _fields(url: str, settings: CaptionSettings) -> Iterator[CaptionFields]:
    """The rows of a list before they are checked."""
    read = READERS.get(f".{url.lower().rpartition('.')[2]}")
    if read is None:
        raise SourceError(f"{url} is of no known format; the name must end in one of {', '.join(READERS)}")
    try:
        with _open(url) as file:
            yield from read(file, settings)
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
    raw: CaptionFields,
    settings: CaptionSettings,
    *,
    ordinal: int,
    source: str,
    came_before: Callable[[int, str], bool],
) -> Caption | Rejection:
    name = f"{ordinal:09d}"
    try:
        if raw.fault is not None:
            raise raw.fault
        if settings.id_column is not None:
            name = _row_id(raw.id, column=settings.id_column)
            if came_before(ordinal, name):
                raise Rejected("duplicate_key", f"{name} came before")
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
