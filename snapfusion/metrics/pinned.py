"""Files of weights from disk, object storage or the hub, checked against their SHA-256."""

import functools
import hashlib
import os
import re
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from snapfusion.models.checksums import file_hash
from snapfusion.storage import store_of

_MAX_REASON = 300
"""Characters of a message about tensors; a network has hundreds."""


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
    actual = hash_of(path) if sha256 is not None else None
    if actual != sha256:
        raise PinnedFileError(f"{source} has SHA-256 {actual}, {sha256} is expected; give the file it names")
    return path


def missing_reason(path: str) -> str | None:
    """Why a path names no file; None if it does, or may be one of the hub's, which is not asked."""
    return None if Path(path).is_file() or _may_be_on_hub(path) else _no_file(path)


def hash_of(path: Path) -> str:
    """SHA-256 of a file, which is read once in this process unless it is changed."""
    status = path.stat()
    return _hash_of_version(path, status.st_size, status.st_mtime_ns)


def check_safetensors(weights: Path) -> None:
    """Refuse weights in other formats: unpickling a file can run code.

    Raises:
        ValueError: if `weights` is not a .safetensors file.
    """
    if weights.suffix != ".safetensors" or not weights.is_file():
        raise ValueError(f"{weights} is not a .safetensors file; pickled weights are never opened")


def load_pinned(network: nn.Module, weights: Path, *, name: str, unused: str = r"(?!)") -> None:
    """Load all tensors of a network from a file of safetensors, for inference.

    Args:
        network: in which they are replaced.
        weights: the file.
        name: of the network, for messages.
        unused: pattern of the names of tensors that the file may have and the network has not.

    Raises:
        ValueError: if the file is in another format, damaged, or has missing or unexpected tensors.
    """
    check_safetensors(weights)
    try:
        tensors = load_file(weights)
    except SafetensorError as error:
        raise ValueError(f"{weights} is damaged: {error}") from None
    try:
        network.load_state_dict(
            {key: value for key, value in tensors.items() if re.fullmatch(unused, key) is None}
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise ValueError(f"{weights} does not hold {name}: {reason[:_MAX_REASON]}") from None
    network.eval().requires_grad_(requires_grad=False)


@functools.lru_cache(maxsize=64)
def _hash_of_version(path: Path, size: int, changed: int) -> str:
    return file_hash(path)


def _locate(source: str) -> Path:
    if "://" in source:
        return _fetch(source)
    path = Path(source)
    if path.is_file():
        return path
    if not _may_be_on_hub(source):
        raise PinnedFileError(_no_file(source))
    return _download(source)


def _may_be_on_hub(source: str) -> bool:
    return not (Path(source).is_absolute() or source.startswith(".") or source.count("/") < 2)


def _no_file(source: str) -> str:
    return f"there is no file {source!r}; give a path, a URL or owner/name/file on a hub"


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
