"""What a run is asked to forget: SHA-256 of addresses, picture hashes and row ids, never those themselves.

The list is a folder with one file a request, named after its content and written once. It only grows: what
is on it does not come back.
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

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.rejections import printable
from pipelines.storage.objects import absolute_url, list_parquet, read_bytes, write_once

EntryKind = Literal["url", "hash", "id"]
ENTRY_KINDS: Final[tuple[EntryKind, ...]] = get_args(EntryKind)

Entry = tuple[EntryKind, bytes]
"""Something on the list: its kind and its key."""

REDACTED_PREFIX: Final = "forgotten:"
"""How an id begins that stands for one that was forgotten."""

MAX_LINE_BYTES: Final = 64 << 10

_SCHEMA = pa.schema([("kind", pa.string()), ("sha256", pa.string())])
_HEX = re.compile(r"(?:(?:sha256|md5)[:=])?([0-9a-f]{64}|[0-9a-f]{32})")
_NUMBER = re.compile(r"[-+]?[0-9]{1,19}")
_ESCAPE = re.compile(r"%([0-9A-Fa-f]{2})")
_UNRESERVED = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")
_PORTS = (None, 80, 443)


class DeletionRequestError(ValueError):
    """A list of things to forget that cannot be read; the message names a line, not what stands in it."""


def normalize_url(text: str) -> str:
    """An address in the form in which two spellings of it are equal; what is no address as it is.

    Scheme (http or https), user, default port and fragment play no part, nor do the case of the host, a dot
    behind it, and which characters of path and query are escaped.
    """
    given = text.strip()
    if not (given.isascii() and given.isprintable()):
        given = printable(given)
    try:
        parts = urlsplit(given)
        host, port = parts.hostname or "", parts.port
    except ValueError:  # a bracket in the host, for one
        return given
    if parts.scheme not in ("http", "https") or not host:
        return given
    query = f"?{_normalize_escapes(parts.query)}" if parts.query else ""
    place = _ascii(host.rstrip(".")) + ("" if port in _PORTS else f":{port}")
    return f"{place}{_normalize_escapes(parts.path) or '/'}{query}"


def normalize_hash(text: str) -> str | None:
    """SHA-256 or MD5 as hexadecimal digits, or the int64 that LAION gives a row; None for anything else."""
    given = text.strip().lower()
    if found := _HEX.fullmatch(given):
        return found[1]
    return str(int(given)) if _NUMBER.fullmatch(given) else None


def sha256_key(normal: str) -> bytes:
    """What the list holds of a thing: 32 bytes of SHA-256 of its normal form."""
    return hashlib.sha256(normal.encode("utf-8", "surrogatepass")).digest()


def redacted_id(id_: str) -> str:
    """What an account says in place of a forgotten row's id; that of a hidden id is the same."""
    return id_ if id_.startswith(REDACTED_PREFIX) else f"{REDACTED_PREFIX}{sha256_key(id_).hex()[:32]}"


@dataclass(frozen=True, kw_only=True)
class DeletionKeys:
    """The keys of a list, by kind."""

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

    def named_by(
        self, *, ids: Iterable[str] = (), urls: Iterable[str] = (), hashes: Iterable[object] = ()
    ) -> set[Entry]:
        """What on the list has one of these ids, addresses, or hashes as metadata spell them."""
        found: set[Entry] = set()
        if self.ids:
            found |= {("id", key) for key in map(sha256_key, ids) if key in self.ids}
        if self.urls:
            found |= {("url", key) for key in map(sha256_key, map(normalize_url, urls)) if key in self.urls}
        if self.hashes:
            normal = (normalize_hash(str(value)) for value in hashes)
            found |= {("hash", key) for key in map(sha256_key, filter(None, normal)) if key in self.hashes}
        return found

    def has(self, id_: str) -> bool:
        """Whether a row's id is on the list, or is an address that is, as in some lists of captions."""
        return bool(self.named_by(ids=(id_,), urls=(id_,)))


@dataclass
class DeletionList:
    """A list that may grow while it is used: of files that were read before only the names are looked at.

    Attributes:
        url: of its folder, which need not exist.
    """

    url: str
    _read: dict[str, DeletionKeys] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        # A worker, which stands in another folder, would find no list there and let everything pass.
        self.url = absolute_url(self.url)

    def read(self) -> DeletionKeys:
        """All requests together, as they are now.

        Raises:
            StorageError: if a file of it cannot be read.
        """
        for name in list_parquet(self.url):
            if name not in self._read:
                self._read[name] = _parse(read_bytes(f"{self.url}/{name}"))
        return reduce(or_, self._read.values(), DeletionKeys())

    def add(self, request: DeletionKeys) -> DeletionKeys:
        """Put on the list what it lacks of `request`, whole or not at all; returns what that was."""
        known = self.read()
        fresh = request - known
        if fresh:
            data = _serialize(fresh)
            write_once(f"{self.url}/{hashlib.sha256(data).hexdigest()[:16]}.parquet", data)
        return fresh

    def __getstate__(self) -> dict[str, object]:
        # Another process reads for itself.
        return {"url": self.url, "_read": {}}


def read_entries(path: str, *, kind: EntryKind) -> dict[bytes, int]:
    """The keys of a list of things to forget, each with the number of the first line that has it.

    One entry a line; blank lines and those that begin with "#" are passed over. An id or an address may hold
    any other character.

    Raises:
        RequestError: if there is no such file, or a line is no entry of this kind.
    """
    found: dict[bytes, int] = {}
    try:
        with fsspec.open(absolute_url(path), "rb") as file:
            for number, line in enumerate(file, start=1):
                if (entry := _entry(line, number=number)) is not None:
                    found.setdefault(_key(entry, kind=kind, number=number), number)
    except OSError as error:
        raise DeletionRequestError(f"{path}: {error.strerror or error}") from None
    except DeletionRequestError as error:
        raise DeletionRequestError(f"{path}, {error}") from None
    if not found:
        raise DeletionRequestError(f"{path} names nothing: one entry a line is accepted")
    return found


def _entry(line: bytes, *, number: int) -> str | None:
    if len(line) > MAX_LINE_BYTES:
        raise DeletionRequestError(f"line {number} has {len(line)} bytes; {MAX_LINE_BYTES} are accepted")
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
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
            f"line {number} is no hash: 64 hexadecimal digits of SHA-256, 32 of MD5 and a 64-bit number are"
            " accepted"
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
    rows = pq.read_table(pa.BufferReader(data)).to_pydict()
    keys: dict[str, set[bytes]] = {kind: set() for kind in ENTRY_KINDS}
    for kind, sha256 in zip(rows["kind"], rows["sha256"], strict=True):
        keys[kind].add(bytes.fromhex(sha256))
    urls, hashes, ids = (frozenset(keys[kind]) for kind in ENTRY_KINDS)
    return DeletionKeys(urls=urls, hashes=hashes, ids=ids)


def _normalize_escapes(text: str) -> str:
    """Path or query with escapes in one spelling: capital digits, and none where none is needed."""

    def spell(found: re.Match[str]) -> str:
        character = chr(int(found[1], 16))
        return character if character in _UNRESERVED else f"%{found[1].upper()}"

    return quote(_ESCAPE.sub(spell, text), safe="%/:@!$&'()*+,;=-._~?")


def _ascii(host: str) -> str:
    try:
        return host if host.isascii() else host.encode("idna").decode()
    except UnicodeError:
        return host
