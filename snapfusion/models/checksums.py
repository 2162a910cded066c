"""Checksums of a folder: the SHA-256 of each of its files, in the format of `sha256sum -c`."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

CHECKSUMS_FILE = "SHA256SUMS"


class ChecksumError(ValueError):
    """A folder in which a file is missing, altered or added since its checksums were written."""


def write_checksums(folder: Path) -> None:
    """Write the checksums of every file below `folder`; call it after the last change to the folder."""
    lines = [f"{file_hash(folder / name)}  {name}\n" for name in _files(folder)]
    (folder / CHECKSUMS_FILE).write_text("".join(lines))


def verify_checksums(folder: Path) -> bool:
    """Compare a folder with its checksums; return False if it has none, as folders of other programs.

    Raises:
        ChecksumError: naming the first file that is missing, altered or added.
    """
    if not (folder / CHECKSUMS_FILE).is_file():
        return False
    expected: dict[str, str] = {}
    for line in (folder / CHECKSUMS_FILE).read_text().splitlines():
        checksum, name = line.split("  ", 1)
        expected[name] = checksum
    for name in sorted(expected.keys() | set(_files(folder))):
        if name not in expected:
            raise ChecksumError(f"{folder}: {name} was added after {CHECKSUMS_FILE} was written")
        if not (folder / name).is_file():
            raise ChecksumError(f"{folder}: {name} is missing; copy the folder again")
        if file_hash(folder / name) != expected[name]:
            raise ChecksumError(f"{folder}: {name} was altered: {CHECKSUMS_FILE} has another SHA-256")
    return True


def file_hash(path: Path) -> str:
    """SHA-256 of a file, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_records(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file below `folder` by its relative path, for a manifest."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": file_hash(path)}
        for path in paths
    }


def _files(folder: Path) -> list[str]:
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if name != CHECKSUMS_FILE)
