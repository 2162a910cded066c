"""Files of weights from disk, object storage or the hub, checked against their SHA-256."""

import hashlib
import os
from pathlib import Path

from snapfusion.models.checksums import file_hash
from snapfusion.storage import store_of


class PinnedFileError(ValueError):
    """A file of weights that is missing, or whose SHA-256 is not the expected one."""


def pinned_file(source: str, *, sha256: str | None = None) -> Path:
    """The local path of a file, downloaded if it is not on this machine.

    Args:
        source: a path; a URL that fsspec can read; or a file on the hub, as "owner/name/file.safetensors".
        sha256: expected SHA-256, 64 hexadecimal digits; None accepts any.

    Raises:
        PinnedFileError: if it cannot be read, or its hash is another.
    """
    path = _locate(source)
    actual = file_hash(path) if sha256 is not None else None
    if actual != sha256:
        raise PinnedFileError(f"{source} has SHA-256 {actual}, {sha256} is expected; give the file it names")
    return path


def check_safetensors(weights: Path) -> None:
    """Refuse weights in other formats: unpickling a file can run code.

    Raises:
        ValueError: if `weights` is not a .safetensors file.
    """
    if weights.suffix != ".safetensors" or not weights.is_file():
        raise ValueError(f"{weights} is not a .safetensors file; pickled weights are never opened")


def _locate(source: str) -> Path:
    if "://" in source:
        return _fetch(source)
    path = Path(source)
    if path.is_file():
        return path
    if path.is_absolute() or source.startswith(".") or source.count("/") < 2:
        raise PinnedFileError(f"there is no file {source!r}; give a path, a URL or owner/name/file on a hub")
    return _download(source)


def _fetch(url: str) -> Path:
    """Copy a file from object storage into the cache, once."""
    root = Path(os.environ.get("SNAPFUSION_CACHE") or Path.home() / ".cache" / "snapfusion")
    target = root / "weights" / hashlib.sha256(url.encode()).hexdigest()[:16] / url.rsplit("/", 1)[1]
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        # Renamed when complete, so that an interrupted copy is never used; each process has its own.
        partial = target.with_name(f".{target.name}.{os.getpid()}")
        filesystem, path = store_of(url)
        try:
            filesystem.get_file(path, str(partial))
        except OSError as error:
            raise PinnedFileError(f"{url} cannot be read: {error}") from None
        partial.rename(target)
    return target


def _download(source: str) -> Path:
    from huggingface_hub import hf_hub_download

    owner, name, file = source.split("/", 2)
    try:
        return Path(hf_hub_download(f"{owner}/{name}", file))
    except OSError as error:  # also the hub's own errors, which are derived from it
        raise PinnedFileError(
            f"{source!r} is neither a local file nor available from the hub ({type(error).__name__}); give a "
            "path, a URL, or owner/name/file on a hub that this machine can reach"
        ) from None
