"""Reads lists of image URLs and captions: Parquet files in the layouts of LAION, COYO and others.

Rows are streamed, each as a link or a rejection: a missing or broken URL or caption costs that row, a corrupt
row group its rows from the corruption on. All other columns become metadata under their own names, except
nulls, NaN, invalid UTF-8 and bytes.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias
from urllib.parse import urlsplit

from pipelines.rejections import Rejected, Rejection, printable
from pipelines.sources import SourceError, check_range
from pipelines.sources.layouts import clean_metadata, find_column, is_bytes, is_text, recognise_layout
from pipelines.sources.listing import SourceFile, list_files
from pipelines.sources.parquet import CorruptParquetError, ParquetRows, RowBatch, open_parquet
from pipelines.sources.settings import LinkSettings
from pipelines.sources.text import clean_caption

MAX_URL_CHARS = 8192
_BATCH_ROWS = 1024
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")

LinkList: TypeAlias = SourceFile
"""One Parquet file of links."""


@dataclass(frozen=True, kw_only=True)
class Link:
    """The URL of an image, and its caption.

    Attributes:
        id: `<list's name>/<ordinal as nine digits>`; unique, whatever ids the list gives.
        ordinal: position in the list, from 0.
        url: http or https, with a host; otherwise as published.
        caption: one line, not empty.
        metadata: the other columns under their own names.
    """

    id: str
    ordinal: int
    url: str
    caption: str
    metadata: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ListHeader:
    """The schema of a list.

    Attributes:
        layout: as `pipelines.sources.layouts.recognise_layout` names it.
        columns: their names, without columns of bytes that are neither URLs nor captions.
        url_column: the column of URLs.
        caption_column: the column of captions.
        rows: their number.
    """

    layout: str
    columns: tuple[str, ...]
    url_column: str
    caption_column: str
    rows: int


def list_links(url: str) -> list[LinkList]:
    """The URL lists at `url`, sorted by name: one Parquet file, a folder of them, or a glob.

    Raises:
        SourceError: if there is none, or `url` cannot be listed.
    """
    lists = list_files(url, endings=(".parquet",))
    if not lists:
        raise SourceError(
            f"no URL lists at {url}: give a .parquet, a folder of them, or a glob such as 'folder/*.parquet'"
        )
    return lists


def read_header(links: LinkList, settings: LinkSettings) -> ListHeader:
    """The schema of a list, from its footer.

    Raises:
        SourceError: if it is not Parquet, or has no column of URLs or captions.
        OSError: if the store fails.
    """
    try:
        with open_parquet(links.url) as rows:
            return _header(rows, settings, url=links.url)
    except CorruptParquetError as error:
        raise SourceError(f"{links.url} is not readable as Parquet: {error}") from None


def read_links(
    links: LinkList, settings: LinkSettings, *, start: int = 0, stop: int | None = None
) -> Iterator[Link | Rejection]:
    """Rows `start` <= ordinal < `stop` of a list, in order, each as a link or a rejection.

    Row groups before `start` are not read. A file that is not Parquet is one rejection.

    Raises:
        ValueError: if the range is invalid.
        SourceError: if the list has no column of URLs or captions.
        OSError: if the store fails, which is no fault of a row.
    """
    check_range(start, stop)
    for row in _read_rows(links, settings, start=start, stop=stop):
        if row.ordinal >= start and (stop is None or row.ordinal < stop):
            yield row


def _read_rows(
    links: LinkList, settings: LinkSettings, *, start: int, stop: int | None
) -> Iterator[Link | Rejection]:
    try:
        with open_parquet(links.url) as rows:
            header = _header(rows, settings, url=links.url)
            for part in rows.batches(header.columns, batch_rows=_BATCH_ROWS, start=start, stop=stop):
                if part.stop <= start:
                    continue
                if isinstance(part, RowBatch):
                    yield from _links(part, links, header, settings)
                else:
                    ordinals = range(part.start, part.stop)
                    yield from (_rejection(part.fault, links, ordinal) for ordinal in ordinals)
    except CorruptParquetError as error:
        rejected = Rejected("torn_shard", str(error))
        yield rejected.record(id=f"{links.name}/.parquet", source=links.name, ordinal=0)


def _header(rows: ParquetRows, settings: LinkSettings, *, url: str) -> ListHeader:
    schema = rows.schema

    def column(meaning: Literal["url", "caption"], *, given: str | None) -> str:
        try:
            name = find_column(schema.names, meaning, given=given)
        except SourceError as error:
            raise SourceError(f"{url}: {error}") from None
        if not is_text(schema.field(name).type):
            raise SourceError(
                f"{url}: column {name!r} is of type {schema.field(name).type}; text is accepted as {meaning}s"
            )
        return name

    texts = (
        column("url", given=settings.url_column),
        column("caption", given=settings.caption_column),
    )
    return ListHeader(
        layout=recognise_layout(schema.names),
        columns=tuple(
            name for name in schema.names if name in texts or not is_bytes(schema.field(name).type)
        ),
        url_column=texts[0],
        caption_column=texts[1],
        rows=rows.num_rows,
    )


def _links(
    batch: RowBatch, links: LinkList, header: ListHeader, settings: LinkSettings
) -> Iterator[Link | Rejection]:
    columns = {name: batch.values(name) for name in header.columns}
    others = [name for name in columns if name not in (header.url_column, header.caption_column)]
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
        except Rejected as rejected:
            yield _rejection(rejected, links, ordinal)


def clean_url(url: str | bytes | None) -> str:
    """The URL, stripped.

    Raises:
        Rejected: `missing_url` or `bad_url`.
    """
    try:
        text = (url.decode() if isinstance(url, bytes) else url or "").strip()
    except UnicodeDecodeError:
        raise Rejected("bad_url", f"no UTF-8: {url!r}") from None
    if not text:
        raise Rejected("missing_url")
    if len(text) > MAX_URL_CHARS:
        raise Rejected("bad_url", f"{len(text)} characters, {MAX_URL_CHARS} are allowed: {text}")
    try:
        parts = urlsplit(text)
        host, _ = parts.hostname, parts.port  # an invalid port raises only when it is read
    except ValueError as error:
        raise Rejected("bad_url", f"{error}: {text}") from None
    if parts.scheme not in ("http", "https"):
        raise Rejected("bad_url", f"not http or https: {text}")
    if not host or _CONTROL.search(text):
        raise Rejected("bad_url", f"{'control characters' if host else 'no host'}: {text}")
    return text


def _rejection(rejected: Rejected, links: LinkList, ordinal: int) -> Rejection:
    return rejected.record(id=_id(links, ordinal), source=links.name, ordinal=ordinal)


def _id(links: LinkList, ordinal: int) -> str:
    return printable(f"{links.name}/{ordinal:09d}")
