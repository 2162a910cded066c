"""The deletion list of a run: SHA-256 of URLs, image hashes and row ids, never those themselves.

It is a folder with one file a request, named after its content and written once. It only grows: whatever is
on it does not come back.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import reduce
from operator import or_
from typing import Final, Literal, get_args
from urllib.parse import quote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.rejections import printable
from pipelines.sources import SourceError
from pipelines.sources.text_files import read_lines
from pipelines.storage.objects import (
    absolute_url,
    check_client,
    list_parquet,
    open_object,
    read_bytes,
    write_once,
)

EntryKind = Literal["url", "hash", "id"]
ENTRY_KINDS: Final[tuple[EntryKind, ...]] = get_args(EntryKind)

Entry = tuple[EntryKind, bytes]
"""An entry of the list: its kind and its key."""

REDACTED_PREFIX: Final = "forgotten:"
"""Prefix of an id that stands for a deleted row's."""

MAX_LINE_BYTES: Final = 64 << 10

_SCHEMA = pa.schema([("kind", pa.string()), ("sha256", pa.string())])
_HEX = re.compile(r"(?:(?:sha256|md5)[:=])?([0-9a-f]{64}|[0-9a-f]{32})")
_NUMBER = re.compile(r"[-+]?[0-9]{1,19}")
_ESCAPE = re.compile(r"%([0-9A-Fa-f]{2})")
_UNRESERVED = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")
_DEFAULT_PORTS = (None, 80, 443)


class DeletionRequestError(ValueError):
    """A deletion request that cannot be read; the message names the line, and never quotes it."""


def normalize_url(text: str) -> str:
    """A URL in a form in which its spellings are equal; any other text as it is.

    Scheme (http or https), user, default port and fragment do not count, nor do the case of the host, a dot
    after it, and which characters of path and query are escaped.
    """
    given = text.strip()
    if not (given.isascii() and given.isprintable()):
        given = printable(given)
    try:
        parts = urlsplit(given)
        host, port = parts.hostname or "", parts.port
    except ValueError:  # for example a bracket in the host
        return given
    if parts.scheme not in ("http", "https") or not host:
        return given
    query = f"?{_normalize_escapes(parts.query)}" if parts.query else ""
    address = _ascii(host.rstrip(".")) + ("" if port in _DEFAULT_PORTS else f":{port}")
    return f"{address}{_normalize_escapes(parts.path) or '/'}{query}"


def normalize_hash(text: str) -> str | None:
    """SHA-256 or MD5 as hexadecimal digits, or the int64 that LAION assigns to a row; else None."""
    given = text.strip().lower()
    if found := _HEX.fullmatch(given):
        return found[1]
    return str(int(given)) if _NUMBER.fullmatch(given) else None


def sha256_key(normal: str) -> bytes:
    """The key of an entry: the 32 bytes of SHA-256 of its normal form."""
    return hashlib.sha256(normal.encode("utf-8", "surrogatepass")).digest()


def redacted_id(id_: str) -> str:
    """The id that a manifest has in place of a deleted row's; a redacted id is returned as it is."""
    return id_ if id_.startswith(REDACTED_PREFIX) else f"{REDACTED_PREFIX}{sha256_key(id_).hex()[:32]}"


@dataclass(frozen=True, kw_only=True)
class DeletionKeys:
    """The keys of a deletion list, by kind."""

    urls: frozenset[bytes] = frozenset()
    hashes: frozenset[bytes] = frozenset()
    ids: frozenset[bytes] = frozenset()

    def __or__(self, other: DeletionKeys) -> DeletionKeys:
        return DeletionKeys(
            urls=self.urls | other.urls, hashes=self.hashes | other.hashes, ids=self.ids | other.ids
        )

    def __sub__(self, other: DeletionKeys) -> DeletionKeys:
        return DeletionKeys(
            urls=self.urls - other.urls, hashes=self.hashes - other.hashes, ids=self.ids - other.ids
        )

    def __len__(self) -> int:
        return len(self.urls) + len(self.hashes) + len(self.ids)

    def find(
        self, *, ids: Iterable[str] = (), urls: Iterable[str] = (), hashes: Iterable[object] = ()
    ) -> set[Entry]:
        """The entries that have one of these ids or URLs, or of these hashes as metadata spell them."""
        given: dict[EntryKind, tuple[frozenset[bytes], Iterable[str]]] = {
            "id": (self.ids, ids),
            "url": (self.urls, map(normalize_url, urls)),
            "hash": (self.hashes, filter(None, (normalize_hash(str(value)) for value in hashes))),
        }
        # Most lists hold one kind, and normalizing costs more than hashing: empty kinds are skipped.
        present = {
            kind: keys.intersection(map(sha256_key, texts)) for kind, (keys, texts) in given.items() if keys
        }
        return {(kind, key) for kind, keys in present.items() for key in keys}

    def has_id(self, id_: str) -> bool:
        """Whether a row's id is on the list, also as a URL: some caption lists have URLs for ids."""
        return bool(self.find(ids=(id_,), urls=(id_,)))


@dataclass
class DeletionList:
    """A deletion list that may grow while it is used: each file is read once.

    Attributes:
        url: of its folder, which need not exist.
    """

    url: str
    _read: dict[str, DeletionKeys] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        # Workers run in another folder: with a relative path they would find no list and let all rows pass.
        self.url = absolute_url(self.url)

    def read(self) -> DeletionKeys:
        """The keys of all requests, as they are now.

        Raises:
            StorageError: if one of its files cannot be read.
        """
        for name in list_parquet(self.url):
            if name not in self._read:
                self._read[name] = _parse(read_bytes(f"{self.url}/{name}"))
        return reduce(or_, self._read.values(), DeletionKeys())

    def add(self, request: DeletionKeys) -> DeletionKeys:
        """Add the keys of `request` that are not on the list, all or none; returns the new ones."""
        new = request - self.read()
        if new:
            data = _serialize(new)
            # Named by its content, so two runs that add the same request write one file.
            write_once(f"{self.url}/{hashlib.sha256(data).hexdigest()[:16]}.parquet", data)
        return new

    def __getstate__(self) -> dict[str, object]:
        # The keys stay out of pickles, which Ray stores: another process reads them itself.
        return {"url": self.url, "_read": {}}


def read_entries(path: str, *, kind: EntryKind) -> dict[bytes, int]:
    """The keys of a deletion request, each with the number of the first line that has it.

    One entry a line; blank lines and those that begin with "#" are skipped. An id or a URL may hold any other
    character.

    Raises:
        DeletionRequestError: if there is no such file, or a line is not an entry of this kind.
    """
    found: dict[bytes, int] = {}
    check_client(path)
    try:
        with open_object(path) as file:
            for number, line in enumerate(read_lines(file), start=1):
                if (entry := _parse_line(line, number=number)) is not None:
                    found.setdefault(_key(entry, kind=kind, number=number), number)
    except OSError as error:
        raise DeletionRequestError(f"{path}: {error.strerror or error}") from None
    except (DeletionRequestError, SourceError) as error:
        raise DeletionRequestError(f"{path}, {error}") from None
    if not found:
        raise DeletionRequestError(f"{path} has no entries; one entry a line is accepted")
    return found


def _parse_line(line: bytes, *, number: int) -> str | None:
    if len(line) > MAX_LINE_BYTES:
        raise DeletionRequestError(f"line {number} has {len(line)} bytes; {MAX_LINE_BYTES} are accepted")
    try:
        text = line.decode().strip()
    except UnicodeDecodeError:
        raise DeletionRequestError(f"line {number} is not UTF-8") from None
    return None if not text or text.startswith("#") else text


def _key(entry: str, *, kind: EntryKind, number: int) -> bytes:
    if kind == "url":
        return sha256_key(normalize_url(entry))
    if kind == "id":
        return sha256_key(entry)
    normal = normalize_hash(entry)
    if normal is None:
        raise DeletionRequestError(
            f"line {number} is not a hash; 64 hexadecimal digits of SHA-256, 32 of MD5 and a 64-bit number"
            " are accepted"
        )
    return sha256_key(normal)


def _serialize(request: DeletionKeys) -> bytes:
    rows = [
        {"kind": kind, "sha256": key.hex()}
        for kind, keys in zip(ENTRY_KINDS, (request.urls, request.hashes, request.ids), strict=True)
        for key in sorted(keys)
    ]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), buffer, compression="zstd")
    return buffer.getvalue()


def _parse(data: bytes) -> DeletionKeys:
    rows = pq.read_table(pa.BufferReader(data)).to_pylist()
    urls, hashes, ids = (
        frozenset(bytes.fromhex(row["sha256"]) for row in rows if row["kind"] == kind) for kind in ENTRY_KINDS
    )
    return DeletionKeys(urls=urls, hashes=hashes, ids=ids)


def _normalize_escapes(text: str) -> str:
    """A path or query with escapes in capital digits, and none where none is needed."""

    def escape(found: re.Match[str]) -> str:
        character = chr(int(found[1], 16))
        return character if character in _UNRESERVED else f"%{found[1].upper()}"

    return quote(_ESCAPE.sub(escape, text), safe="%/:@!$&'()*+,;=-._~?")


def _ascii(host: str) -> str:
    try:
        return host if host.isascii() else host.encode("idna").decode()
    except UnicodeError:
        return host
