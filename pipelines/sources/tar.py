"""Reads tar members in one forward pass, without extraction; distinguishes truncation from a clean end."""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterator
from typing import IO

from pipelines.rejections import Rejected

_READ_BYTES = 1 << 20
_MAX_NAME_CHARS = 1024
# Headers that carry names and attributes, whose bodies the tarfile module reads into memory whole.
_ATTRIBUTES = {
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
}
_MAX_ATTRIBUTE_BYTES = 1 << 20


class TornShardError(Exception):
    """The tar is truncated or corrupt before its end marker.

    Attributes:
        inside_member: whether the last member that began is itself incomplete.
    """

    def __init__(self, message: str, *, inside_member: bool = False) -> None:
        super().__init__(message)
        self.inside_member = inside_member


class Member:
    """A member of a tar; readable until the next one is requested.

    Attributes:
        name: as spelled in the tar; never used as a path.
    """

    def __init__(self, archive: tarfile.TarFile, header: tarfile.TarInfo) -> None:
        self._archive = archive
        self._header = header
        self.name = header.name.removeprefix("./")

    def check(self) -> None:
        """Check name and type.

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
            TornShardError: if the tar ends inside.
        """
        if self._header.size > max_bytes:
            raise Rejected(
                "oversized_member", f"{self.name}: {self._header.size} bytes, {max_bytes} are allowed"
            )
        content = self._archive.extractfile(self._header)
        if content is None:
            raise Rejected("not_a_file", self.name)
        try:
            return content.read()
        except tarfile.TarError as error:
            raise TornShardError(str(error), inside_member=True) from None


def is_unsafe(name: str) -> bool:
    """Whether a name is absolute or contains "..", on any system, or is longer than 1,024 characters."""
    parts = re.split(r"[\\/]", name)
    return not parts[0] or bool(re.match("[A-Za-z]:", name)) or ".." in parts or len(name) > _MAX_NAME_CHARS


def read_members(file: IO[bytes]) -> Iterator[Member]:
    """The members in order, folders left out. `file` is only read forward, never sought.

    Raises:
        TornShardError: after the members before the tear. A tar without its end marker is torn.
    """
    try:
        archive = tarfile.open(  # noqa: SIM115 - the caller closes its file
            fileobj=_ForwardReader(file),
            mode="r|",
            tarinfo=_StrictHeader,
            bufsize=_READ_BYTES,
            errors="surrogateescape",
        )
        while (header := archive.next()) is not None:
            # tarfile keeps every header it has read, so that memory would grow with the shard.
            archive.members.clear()  # type: ignore[attr-defined]
            if not header.isdir():
                yield Member(archive, header)
    except (ValueError, IndexError, OverflowError) as error:
        # tarfile's parser of extended headers does not catch these on malformed input.
        raise TornShardError(f"a malformed header: {error}") from None
    except tarfile.TarError as error:
        # `_StrictHeader` reports bad headers, so this is tarfile failing to skip the rest of a member.
        raise TornShardError(str(error), inside_member=True) from None


class _ForwardReader(io.RawIOBase):
    """A file that raises at its second empty read.

    A header may announce any number of bytes, and tarfile would keep reading at the end of the file until it
    had counted to that number.
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


class _StrictHeader(tarfile.TarInfo):
    """A header that raises on invalid blocks, most of which tarfile treats as the end of the archive."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _StrictHeader:
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
