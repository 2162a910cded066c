"""Members of a tar file in one forward pass: nothing is extracted, and a tear is told from a clean end."""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterator
from typing import IO

from pipelines.rejections import Rejected

_READ_BYTES = 1 << 20
_MAX_NAME_CHARS = 1024
# Headers that carry names and attributes, which the tarfile module reads whole.
_ATTRIBUTES = frozenset(
    [
        tarfile.XHDTYPE,
        tarfile.XGLTYPE,
        tarfile.SOLARIS_XHDTYPE,
        tarfile.GNUTYPE_LONGNAME,
        tarfile.GNUTYPE_LONGLINK,
    ]
)
_MAX_ATTRIBUTE_BYTES = 1 << 20


class TornShardError(Exception):
    """The tar breaks off, or turns into something else, before its end marker.

    Attributes:
        inside_member: whether the last member that was begun is itself not whole.
    """

    def __init__(self, message: str, *, inside_member: bool = False) -> None:
        super().__init__(message)
        self.inside_member = inside_member


class Member:
    """One member, readable until the next is asked for.

    Attributes:
        name: as the tar spells it, never used as a path.
        size: bytes.
    """

    def __init__(self, archive: tarfile.TarFile, header: tarfile.TarInfo) -> None:
        self._archive = archive
        self._header = header
        self.name = header.name.removeprefix("./")
        self.size = header.size

    def check(self) -> None:
        """Look at name and kind.

        Raises:
            Rejected: `unsafe_name` or `not_a_file`.
        """
        if is_unsafe(self.name):
            raise Rejected("unsafe_name", self.name)
        if not self._header.isreg():
            raise Rejected("not_a_file", f"{self.name} is of tar type {self._header.type!r}")

    def read(self, *, max_bytes: int) -> bytes:
        """The content.

        Raises:
            Rejected: `oversized_member`, before anything is read.
            TornShardError: if the tar breaks off inside.
        """
        if self.size > max_bytes:
            raise Rejected("oversized_member", f"{self.name}: {self.size} bytes, {max_bytes} are allowed")
        content = self._archive.extractfile(self._header)
        if content is None:
            raise Rejected("not_a_file", self.name)
        try:
            return content.read()
        except tarfile.TarError as error:
            raise TornShardError(str(error), inside_member=True) from None


def is_unsafe(name: str) -> bool:
    """Whether a name is absolute or climbs, on any system, or is longer than 1,024 characters."""
    parts = re.split(r"[\\/]", name)
    return not parts[0] or bool(re.match("[A-Za-z]:", name)) or ".." in parts or len(name) > _MAX_NAME_CHARS


def read_members(file: IO[bytes]) -> Iterator[Member]:
    """The members in order, folders left out. `file` is read forward only and never sought.

    Raises:
        TornShardError: after the members before the tear. A tar that ends without its end marker is torn.
    """
    try:
        archive = tarfile.open(  # noqa: SIM115 - the caller's file is closed by the caller
            fileobj=_Forward(file), mode="r|", tarinfo=_Header, bufsize=_READ_BYTES, errors="surrogateescape"
        )
        while (header := _next(archive)) is not None:
            # The module keeps every header it has seen; a stream has no use for them.
            archive.members.clear()  # type: ignore[attr-defined]
            if not header.isdir():
                yield Member(archive, header)
    except tarfile.TarError as error:
        # Headers report for themselves, below: this is the module, passing over the rest of a member.
        raise TornShardError(str(error), inside_member=True) from None


def _next(archive: tarfile.TarFile) -> tarfile.TarInfo | None:
    try:
        return archive.next()
    except (ValueError, IndexError, OverflowError) as error:
        # The parser of extended headers lets these through when it meets garbage.
        raise TornShardError(f"a malformed header: {error}") from None


class _Forward(io.RawIOBase):
    """A file that says at its second empty read that it has ended.

    Without this the module would go on reading, for years if a header announces enough bytes.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._ended = False

    def read(self, size: int = -1, /) -> bytes:
        data = self._file.read(size)
        if not data and self._ended:
            raise TornShardError("unexpected end of data", inside_member=True)
        self._ended = not data
        return data


class _Header(tarfile.TarInfo):
    """A header that tells a tear from the end: the tarfile module itself treats most tears as the end."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if len(buf) == tarfile.BLOCKSIZE and not any(buf):
                raise  # the end marker
            raise TornShardError(f"{error}, where a header or the end marker should be") from None
        if header.size < 0:
            raise TornShardError(f"a header announces {header.size} bytes")
        if header.type in _ATTRIBUTES and header.size > _MAX_ATTRIBUTE_BYTES:
            raise TornShardError(f"a header announces {header.size} bytes of attributes")
        return header
