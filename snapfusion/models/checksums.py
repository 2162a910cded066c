"""Checksums of a folder: the SHA-256 of each of its files, in the format of `sha256sum -c`."""

import hashlib
from pathlib import Path, PurePosixPath
from typing import Any

CHECKSUMS_FILE = "SHA256SUMS"
_NOTES = ("README", "LICENSE", "NOTICE")
_INERT_SUFFIXES = (".md", ".png", ".jpg", ".jpeg", ".webp")


class ChecksumError(ValueError):
    """A folder in which a file is missing, altered or added since its checksums were written."""


def write_checksums(folder: Path) -> None:
    """Write the checksums of every file below `folder` that programs read; call it after the last change."""
    # Notes may be edited: a card is completed by whoever publishes the model.
    lines = [f"{checksum}  {name}\n" for name, checksum in _checksums(folder).items() if not _is_inert(name)]
    (folder / CHECKSUMS_FILE).write_text("".join(lines))


def verify_checksums(folder: Path) -> bool:
    """Compare a folder with its checksums; return False if it has none, as folders of other programs.

    Raises:
        ChecksumError: naming the first file that is missing, altered or added.
    """
    if not (folder / CHECKSUMS_FILE).is_file():
        return False
    lines = [line.split("  ", 1) for line in (folder / CHECKSUMS_FILE).read_text().splitlines()]
    expected = {name: checksum for checksum, name in lines}
    compare_files(folder, expected=expected, actual=_checksums(folder), record=CHECKSUMS_FILE)
    return True


def compare_files(folder: Path, *, expected: dict[str, Any], actual: dict[str, Any], record: str) -> None:
    """Compare the files of a folder, each with its checksum or the like, with what `record` says of them.

    Files that no program reads may be added: hidden ones, notes and images.

    Raises:
        ChecksumError: naming the first file that is missing, altered or added.
    """
    for name in sorted(expected.keys() | actual.keys()):
        if name not in actual:
            raise ChecksumError(f"{folder}: {name} is missing; copy the folder again")
        if name not in expected:
            if _is_inert(name):
                continue
            raise ChecksumError(f"{folder}: {name} is not in {record}: it was added")
        if actual[name] != expected[name]:
            raise ChecksumError(f"{folder}: {name} was altered: {record} has another SHA-256")


def _is_inert(name: str) -> bool:
    """Tell whether no program reads a file of this name: .DS_Store, .gitattributes, README.md, a preview."""
    path = PurePosixPath(name)
    return path.name.startswith(".") or path.stem in _NOTES or path.suffix.lower() in _INERT_SUFFIXES


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


def _checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of every file but the checksums themselves."""
    return {name: file["sha256"] for name, file in file_records(folder).items() if name != CHECKSUMS_FILE}
