"""A seal on a folder: the SHA-256 of every file in it, in the format that `sha256sum -c` reads."""

from __future__ import annotations

import hashlib
from pathlib import Path

CHECKSUMS_FILE = "SHA256SUMS"


class ChecksumError(ValueError):
    """A sealed folder in which a file is missing, altered or added."""


def write_checksums(folder: Path) -> None:
    """Write the seal over every file below `folder`; the last thing done to it."""
    lines = [f"{file_hash(folder / name)}  {name}\n" for name in _files(folder)]
    (folder / CHECKSUMS_FILE).write_text("".join(lines))


def verify_checksums(folder: Path) -> bool:
    """Compare a folder with its seal; False if it has none (a folder made by others).

    Raises:
        SealError: naming the first file that is missing, altered or added.
    """
    if not (folder / CHECKSUMS_FILE).is_file():
        return False
    stated: dict[str, str] = {}
    for line in (folder / CHECKSUMS_FILE).read_text().splitlines():
        hexadecimal, name = line.split("  ", 1)
        stated[name] = hexadecimal
    for name in sorted(stated.keys() | set(_files(folder))):
        if name not in stated:
            raise ChecksumError(f"{folder}: {name} was added after the folder was sealed")
        if not (folder / name).is_file():
            raise ChecksumError(f"{folder}: {name} is missing; copy the folder again")
        if file_hash(folder / name) != stated[name]:
            raise ChecksumError(
                f"{folder}: {name} was altered: its SHA-256 is not the one in {CHECKSUMS_FILE}"
            )
    return True


def file_hash(path: Path) -> str:
    """SHA-256 of a file, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(folder: Path) -> list[str]:
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if name != CHECKSUMS_FILE)
