"""Reads tar members in one forward pass, without extraction; distinguishes truncation from a clean end.

Python's `tarfile` ends quietly at most damage, so of it only the parser of a single header is used.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from typing import IO, Final

from pipelines.rejections import Rejected
from pipelines.sources.file_kinds import kind_of

_BLOCK: Final = tarfile.BLOCKSIZE
_READ_BYTES: Final = 1 << 20
_MAX_NAME_CHARS: Final = 1024
# Two zero blocks end a tar, and most programs fill its last record with more of them.
_END_BLOCKS: Final = 2
_MAX_END_BLOCKS: Final = _END_BLOCKS + tarfile.RECORDSIZE // _BLOCK - 1
_FILES: Final = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_PAX: Final = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
# Headers whose bodies describe the next member.
_EXTENSIONS: Final = (*_PAX, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_MAX_EXTENSIONS: Final = 16
_MAX_EXTENSION_BYTES: Final = 1 << 20
_MAX_SIZE_DIGITS: Final = 20
_PAX_RECORD: Final = re.compile(rb"(\d{1,7}) ([^=]+)=")
# The flag of a GNU sparse header, and of each block that continues it, that another block follows.
_SPARSE_FLAGS: Final = (482, 504)


class TornShardError(Exception):
    """The shard is truncated or corrupt.

    Attributes:
        offset: of the first byte that belongs to no member read before, extended headers included.
        inside_member: whether the last member that began is itself incomplete.
        reason: a key of `REASONS`.
    """

    def __init__(
        self, message: str, *, offset: int = 0, inside_member: bool = False, reason: str = "torn_shard"
    ) -> None:
        super().__init__(message)
        self.offset = offset
        self.inside_member = inside_member
        self.reason = reason


class Member:
    """A member of a tar; readable until the next one is requested.

    Attributes:
        name: as spelled in the tar; never used as a path.
        offset: of its first header, in bytes.
        type: tar's type flag; a sparse file has that of GNU tar.
        size: bytes of its content.
    """

    def __init__(self, tar: _Tar, *, name: str, type: bytes, size: int, offset: int) -> None:  # noqa: A002
        self.name = name.removeprefix("./")
        self.offset = offset
        self.type = type
        self.size = size
        self._tar = tar

    def check(self) -> None:
        """Check name and type.

        Raises:
            Rejected: `unsafe_name` or `not_a_file`.
        """
        if is_unsafe(self.name):
            raise Rejected("unsafe_name", self.name)
        if self.type not in _FILES:
            raise Rejected("not_a_file", f"{self.name} is of tar type {self.type!r}")

    def read(self, *, max_bytes: int) -> bytes:
        """The content; a second call gives nothing.

        Raises:
            Rejected: `oversized_member`, before anything is read.
            TornShardError: if the tar ends inside.
        """
        if self.size > max_bytes:
            raise Rejected("oversized_member", f"{self.name}: {self.size} bytes, {max_bytes} are allowed")
        return self._tar.read_content()


def is_unsafe(name: str) -> bool:
    """Whether a name is absolute or contains "..", on any system, or is longer than 1,024 characters."""
    parts = re.split(r"[\\/]", name)
    return not parts[0] or bool(re.match("[A-Za-z]:", name)) or ".." in parts or len(name) > _MAX_NAME_CHARS


def read_members(file: IO[bytes]) -> Iterator[Member]:
    """The members in order, folders left out; of several tars in one file, those of all.

    `file` is only read forward, never sought. Memory holds one content and a buffer of 1 MiB.

    Raises:
        TornShardError: after the members before the tear. A tar without its end marker, two zero blocks, is
            torn, and so is one with more zeros than an end has.
    """
    return _Tar(file).members()


class _Tar:
    """A tar that is read forward."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._chunk = b""
        self._used = 0  # bytes of the chunk
        self._passed = 0  # bytes of the file before the chunk
        self._began = 0  # offset of the present member's first header, or of the zeros after the last one
        self._tar_began = 0  # offset of the present tar, if the file has several
        self._left = 0  # bytes of the present member's content and padding that were not read
        self._content = 0  # bytes of its content that were not read

    def members(self) -> Iterator[Member]:
        while (member := self._next_member()) is not None:
            if member.type != tarfile.DIRTYPE:
                yield member
            self._skip(self._left)

    def read_content(self) -> bytes:
        content = self._read(self._content)
        self._left -= len(content)
        if len(content) < self._content:
            raise self._tear("unexpected end of data", inside_member=True)
        self._content = 0
        return content

    def _next_member(self) -> Member | None:
        """The next member, by its header and the extended headers before it; None at the end."""
        self._began = self._position
        pax: dict[str, str] = {}
        for extensions in range(_MAX_EXTENSIONS + 1):
            block = self._read(_BLOCK)
            if not any(block):
                if extensions:
                    raise self._tear("an extended header without its member")
                following = self._pass_end(block)
                if following is None:
                    return None
                block = following
            header = self._parse(block)
            if header.type not in _EXTENSIONS:
                return self._member(header, block, pax)
            pax |= self._read_extension(header)
        raise self._tear(f"more than {_MAX_EXTENSIONS} extended headers before one member")

    def _pass_end(self, block: bytes) -> bytes | None:
        """Pass zero blocks; the block after them where another tar begins, or None at the end of the file."""
        zeros = 0
        while len(block) == _BLOCK and not any(block):
            zeros += 1
            if zeros > _MAX_END_BLOCKS:
                raise self._tear(f"more than {_MAX_END_BLOCKS} blocks of zeros, where an end has no more")
            block = self._read(_BLOCK)
        if zeros < _END_BLOCKS:
            found = f"{zeros} blocks of zeros, where an end has two"
            raise self._tear(found if self._position else "the file is empty")
        if not any(block):
            return None
        begins = self._position - len(block)
        # A hole in a damaged file is seldom as long as an end.
        if zeros > _END_BLOCKS and (begins - self._tar_began) % tarfile.RECORDSIZE:
            raise self._tear(f"data after {zeros} blocks of zeros")
        self._parse(block)
        self._began = self._tar_began = begins
        return block

    def _parse(self, block: bytes) -> tarfile.TarInfo:
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except (tarfile.HeaderError, ValueError, OverflowError) as error:
            if self._position == len(block) and (kind := kind_of(block)):
                raise TornShardError(f"the file is {kind}", reason="not_a_shard") from None
            raise self._tear(f"{error}, where a header or the end marker should be") from None
        return header

    def _read_extension(self, header: tarfile.TarInfo) -> dict[str, str]:
        if not 0 <= header.size <= _MAX_EXTENSION_BYTES:
            raise self._tear(f"a header announces {header.size} bytes of attributes")
        body = self._read(header.size + -header.size % _BLOCK)[: header.size]
        if len(body) < header.size:
            raise self._tear("unexpected end of data in an extended header")
        if header.type == tarfile.GNUTYPE_LONGNAME:
            return {"path": body.partition(b"\0")[0].decode("utf-8", "surrogateescape")}
        if header.type not in _PAX:
            return {}  # targets of links, and attributes of the whole archive
        try:
            return _parse_pax(body)
        except ValueError as error:
            raise self._tear(f"a malformed extended header: {error}") from None

    def _member(self, header: tarfile.TarInfo, block: bytes, pax: dict[str, str]) -> Member:
        is_sparse = header.type == tarfile.GNUTYPE_SPARSE
        flag = _SPARSE_FLAGS[0]
        while is_sparse and block[flag]:
            block, flag = self._read(_BLOCK), _SPARSE_FLAGS[1]
            if len(block) < _BLOCK:
                raise self._tear("unexpected end of data in a sparse header")
        size = self._size(header, pax)
        self._content, self._left = size, size + -size % _BLOCK
        kind = tarfile.GNUTYPE_SPARSE if any(name.startswith("GNU.sparse") for name in pax) else header.type
        return Member(self, name=pax.get("path") or header.name, type=kind, size=size, offset=self._began)

    def _size(self, header: tarfile.TarInfo, pax: dict[str, str]) -> int:
        # Links, folders and devices have no content, whatever size they announce.
        if not header.isreg() and header.type in tarfile.SUPPORTED_TYPES:
            return 0
        announced = pax.get("size", str(header.size))
        if not announced.isdecimal() or len(announced) > _MAX_SIZE_DIGITS:
            raise self._tear(f"a header announces {announced[:40]} bytes")
        return int(announced)

    @property
    def _position(self) -> int:
        return self._passed + self._used

    def _read(self, count: int) -> bytes:
        """The next `count` bytes; fewer at the end of the file."""
        pieces = []
        while count > 0 and self._fill():
            piece = self._chunk[self._used : self._used + count]
            self._used += len(piece)
            count -= len(piece)
            pieces.append(piece)
        return b"".join(pieces)

    def _skip(self, count: int) -> None:
        while count > 0:
            if not self._fill():
                raise self._tear("unexpected end of data", inside_member=True)
            step = min(count, len(self._chunk) - self._used)
            self._used += step
            count -= step
        self._left = self._content = 0

    def _fill(self) -> bool:
        """Read a chunk once the last one is used up; False at the end of the file."""
        if self._used == len(self._chunk):
            self._passed += self._used
            self._chunk, self._used = self._file.read(_READ_BYTES), 0
        return bool(self._chunk)

    def _tear(self, message: str, *, inside_member: bool = False) -> TornShardError:
        return TornShardError(message, offset=self._began, inside_member=inside_member)


def _parse_pax(body: bytes) -> dict[str, str]:
    """The records of a PAX header, each `<length> <key>=<value>` and a line feed."""
    values: dict[str, str] = {}
    position = 0
    while position < len(body):
        record = _PAX_RECORD.match(body, position)
        end = position + int(record[1]) if record else 0
        if record is None or not record.end() < end <= len(body) or body[end - 1 : end] != b"\n":
            raise ValueError(f"no record at byte {position}")
        key, value = record[2], body[record.end() : end - 1]
        values[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        position = end
    return values
