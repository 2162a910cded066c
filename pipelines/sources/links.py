"""Lists of URLs and captions as LAION, COYO and others publish them: Parquet, in any of the layouts.

A list is one file of a data set. Its rows are streamed, and each is a link or a rejection: a URL or a caption
that is missing or broken costs that row, a corrupt row group the rows from there on. What else a row says is
kept under the names that the list gives it, except nulls, NaN, texts that are no UTF-8, and bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa

from pipelines.rejections import Rejected, Rejection, printable
from pipelines.sources import SourceError
from pipelines.sources.layouts import SPELLINGS, clean_metadata, is_bytes, recognise_layout
from pipelines.sources.listing import list_files
from pipelines.sources.parquet import CorruptParquetError, RowBatch, open_parquet
from pipelines.sources.settings import LinkSettings
from pipelines.sources.text import clean_caption

MAX_URL_CHARS = 8192
_BATCH_ROWS = 1024
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


@dataclass(frozen=True, kw_only=True)
class LinkList:
    """One Parquet file of links.

    Attributes:
        url: where it lies.
        name: its path below what was listed, without `.parquet`; the first part of its links' ids.
        size: bytes.
    """

    url: str
    name: str
    size: int


@dataclass(frozen=True, kw_only=True)
class Link:
    """A picture that could be fetched, and its caption.

    Attributes:
        id: `<list's name>/<ordinal as nine digits>`; unique, whatever ids the list gives.
        ordinal: position in the list, from 0.
        url: http or https, with a host; otherwise as it was published.
        caption: one line, not empty.
        metadata: what else the list says, names as they are spelled there; URL and caption are not in it.
    """

    id: str
    ordinal: int
    url: str
    caption: str
    metadata: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ListHeader:
    """What a list says of itself.

    Attributes:
        layout: as `pipelines.sources.layouts.recognise_layout` names it.
        columns: their names, those of bytes left out.
        url_column: the one that holds URLs.
        caption_column: the one that holds captions.
        rows: how many there are.
    """

    layout: str
    columns: tuple[str, ...]
    url_column: str
    caption_column: str
    rows: int


def list_links(url: str) -> list[LinkList]:
    """The URL lists that `url` means, sorted by name: one Parquet file, a folder of them, or a glob.

    Raises:
        SourceError: if there is none, or the place cannot be listed.
    """
    places = list_files(url, endings=(".parquet",))
    if not places:
        raise SourceError(
            f"no URL lists at {url}: give a .parquet, a folder of them, or a glob such as 'folder/*.parquet'"
        )
    return [LinkList(url=place.url, name=place.stem, size=place.size) for place in places]


def read_header(links: LinkList, settings: LinkSettings) -> ListHeader:
    """What the footer of a list says; its rows are not read.

    Raises:
        SourceError: if it is no Parquet file, or has no column of URLs or captions.
        OSError: if the store does not answer.
    """
    try:
        with open_parquet(links.url) as rows:
            return _header(rows.schema, settings, url=links.url, rows=rows.num_rows)
    except CorruptParquetError as error:
        raise SourceError(f"{links.url} is not readable as Parquet: {error}") from None


def read_links(
    links: LinkList, settings: LinkSettings, *, start: int = 0, stop: int | None = None
) -> Iterator[Link | Rejection]:
    """Rows `start` <= ordinal < `stop` of a list, in order, each as a link or as a rejection.

    Row groups before `start` are not read. A file that is no Parquet at all is one rejection.

    Raises:
        ValueError: if the range is not one.
        SourceError: if the list has no column of URLs or captions, which the settings can mend.
        OSError: if the store does not answer: that is no fault of a row.
    """
    if start < 0 or (stop is not None and stop < start):
        raise ValueError(f"start {start} and stop {stop} given; 0 <= start <= stop is accepted")
    for row in _rows(links, settings, start=start, stop=stop):
        if row.ordinal >= start and (stop is None or row.ordinal < stop):
            yield row


def _rows(
    links: LinkList, settings: LinkSettings, *, start: int, stop: int | None
) -> Iterator[Link | Rejection]:
    try:
        with open_parquet(links.url) as rows:
            header = _header(rows.schema, settings, url=links.url, rows=rows.num_rows)
            for part in rows.batches(header.columns, batch_rows=_BATCH_ROWS, start=start, stop=stop):
                if part.stop <= start:
                    continue
                if isinstance(part, RowBatch):
                    yield from _judge(part, links, header, settings)
                    continue
                for ordinal in range(part.start, part.stop):
                    yield _rejected(Rejected("torn_shard", part.detail), links, ordinal=ordinal)
    except CorruptParquetError as error:
        yield Rejected("torn_shard", str(error)).record(
            id=f"{links.name}/.parquet", source=links.name, ordinal=0
        )


def _header(schema: pa.Schema, settings: LinkSettings, *, url: str, rows: int) -> ListHeader:
    names = schema.names
    return ListHeader(
        layout=recognise_layout(names),
        columns=tuple(name for name in dict.fromkeys(names) if not is_bytes(schema.field(name).type)),
        url_column=_column(settings.url_column, SPELLINGS["url"], schema, url=url, what="URLs"),
        caption_column=_column(
            settings.caption_column, SPELLINGS["caption"], schema, url=url, what="captions"
        ),
        rows=rows,
    )


def _column(asked: str | None, usual: Sequence[str], schema: pa.Schema, *, url: str, what: str) -> str:
    wanted = usual if asked is None else (asked,)
    for name in wanted:
        if name in schema.names:
            if not _is_text(schema.field(name).type):
                raise SourceError(f"{url}: column {name!r} is of type {schema.field(name).type}, not text")
            return name
    there = ", ".join(schema.names)
    raise SourceError(f"{url}: no column of {what} named {' or '.join(wanted)}; it has {there}")


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    # A column without a single value may be of type null.
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind))


def _judge(
    batch: RowBatch, links: LinkList, header: ListHeader, settings: LinkSettings
) -> Iterator[Link | Rejection]:
    columns = {name: batch.values(name) for name in header.columns}
    others = [name for name in header.columns if name not in (header.url_column, header.caption_column)]
    pairs = zip(columns[header.url_column], columns[header.caption_column], strict=True)
    for row, (url, caption) in enumerate(pairs):
        ordinal = batch.start + row
        try:
            yield Link(
                id=_id(links, ordinal),
                ordinal=ordinal,
                url=clean_url(url),
                caption=clean_caption(caption, max_chars=settings.max_caption_chars),
                metadata=clean_metadata({name: columns[name][row] for name in others}),
            )
        except Rejected as verdict:
            yield _rejected(verdict, links, ordinal=ordinal)


def clean_url(url: str | bytes | None) -> str:
    """The URL without white space at its ends.

    Raises:
        Rejected: `missing_url` or `bad_url`.
    """
    if isinstance(url, bytes):
        raise Rejected("bad_url", f"no UTF-8: {url!r}")
    text = (url or "").strip()
    if not text:
        raise Rejected("missing_url")
    if len(text) > MAX_URL_CHARS:
        raise Rejected("bad_url", f"{len(text)} characters, {MAX_URL_CHARS} are allowed: {text}")
    try:
        parts = urlsplit(text)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise Rejected("bad_url", f"{error}: {text}") from None
    if parts.scheme not in ("http", "https"):
        raise Rejected("bad_url", f"not http or https: {text}")
    if not host or _CONTROL.search(text):
        raise Rejected("bad_url", f"{'control characters' if host else 'no host'}: {text}")
    return text


def _rejected(verdict: Rejected, links: LinkList, *, ordinal: int) -> Rejection:
    return verdict.record(id=_id(links, ordinal), source=links.name, ordinal=ordinal)


def _id(links: LinkList, ordinal: int) -> str:
    return printable(f"{links.name}/{ordinal:09d}")
