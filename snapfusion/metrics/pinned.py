"""A file of weights from wherever it lies, held to its hash: a figure is only as good as what measured it."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import fsspec

_CHUNK_BYTES = 1 << 22


class PinnedFileError(ValueError):
    """A file of weights that is missing, or is not the one that was named."""


def pinned_file(place: str, *, sha256: str | None = None) -> Path:
    """The file at `place`, on this machine.

    Args:
        place: a path; a URL that fsspec can read; or a file on the hub, as "owner/name/file.safetensors".
        sha256: what its SHA-256 must be, 64 hexadecimal digits; None accepts any.

    Raises:
        PinnedFileError: if it is not there, or its hash is another.
    """
    path = _locate(place)
    found = file_hash(path) if sha256 is not None else None
    if found != sha256:
        raise PinnedFileError(f"{place} has SHA-256 {found}, {sha256} was asked for; give the file it names")
    return path


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, 64 hexadecimal digits."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            sha.update(chunk)
    return sha.hexdigest()


def _locate(place: str) -> Path:
    if "://" in place:
        return _fetch(place)
    path = Path(place)
    if path.is_file():
        return path
    if path.is_absolute() or place.startswith(".") or place.count("/") < 2:
        raise PinnedFileError(f"there is no file {place!r}; give a path, a URL or owner/name/file on the hub")
    return _download(place)


def _fetch(url: str) -> Path:
    """Copy a file from object storage once; a half-made copy is never taken for a whole one."""
    root = Path(os.environ.get("SNAPFUSION_CACHE") or Path.home() / ".cache" / "snapfusion")
    target = root / "weights" / hashlib.sha256(url.encode()).hexdigest()[:16] / url.rsplit("/", 1)[1]
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{os.getpid()}")
        filesystem, path = fsspec.core.url_to_fs(url)
        try:
            filesystem.get_file(path, str(partial))
        except OSError as error:
            raise PinnedFileError(f"{url} cannot be read: {error}") from None
        partial.rename(target)
    return target


def _download(place: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    owner, name, file = place.split("/", 2)
    try:
        return Path(hf_hub_download(f"{owner}/{name}", file))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise PinnedFileError(
            f"{place!r} is neither a file here nor one that the hub gave ({type(error).__name__}); give a "
            "path, a URL, or owner/name/file on a hub that this machine can reach"
        ) from None
