"""Downloading a model from a hub: only the files that are read."""

from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from snapfusion.models.errors import ModelError
from snapfusion.models.network_files import NETWORKS, choose_variant, group_by_variant

_DESCRIPTIONS = ("*.json", "*/*.json", "*/*.txt", "SHA256SUMS", "unet/*.py")
"""Small files of a model: configurations, tokenizer, checksums, the source of a UNet."""


def download(
    hub_id: str, *, revision: str | None, variant: str | None = None, patterns: Sequence[str] | None = None
) -> Path:
    """Download a model to the hub's own cache, where it stays, and return its local folder.

    Without a connection the cached files are used.

    Args:
        hub_id: "owner/name".
        revision: branch, tag or commit; None for the default branch.
        variant: of the weights, as `snapfusion.models.network_files.read_network` takes it.
        patterns: globs of the files; None for those of networks, tokenizer and scheduler, with the weights of
            one variant.

    Raises:
        ModelError: if the hub has no such model, or cannot be reached and the cache has none.
    """
    from huggingface_hub import snapshot_download

    try:
        small = _DESCRIPTIONS if patterns is None else list(patterns)
        folder = Path(snapshot_download(hub_id, revision=revision, allow_patterns=list(small)))
        names = _list_files(hub_id, revision=revision) if patterns is None else None
        if names is None:
            return folder
        needed = needed_files(names, variant=variant)
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=needed))
    except (OSError, ValueError) as error:  # also the hub's own errors, which are derived from these
        raise ModelError(
            f"{hub_id!r} is neither a folder here nor a model the hub gave ({type(error).__name__}); "
            "give a diffusers folder, a URL of one, or a hub id that this machine can reach"
        ) from None


def _list_files(hub_id: str, *, revision: str | None) -> list[str] | None:
    """Names of all files of a model; None without a connection, when its cached files have to do."""
    from huggingface_hub import HfApi

    try:
        info = HfApi().model_info(hub_id, revision=revision)
    except Exception:  # noqa: BLE001 - of an HTTP library that the hub's client may exchange for another
        return None
    return [file.rfilename for file in info.siblings or ()]


def needed_files(names: Sequence[str], *, variant: str | None) -> list[str]:
    """Choose the files of a model that are read from the names of all.

    Args:
        names: paths in the model's folder.
        variant: of the weights; None for the plain ones, or the only ones there.
    """
    chosen = [name for name in names if any(fnmatch(name, pattern) for pattern in _DESCRIPTIONS)]
    for network in NETWORKS:
        files = [Path(name) for name in names if fnmatch(name, f"{network}/*.safetensors")]
        if by_variant := group_by_variant(files):
            kept = by_variant[choose_variant(set(by_variant), variant=variant)]
            chosen += [path.as_posix() for path in kept]
    return chosen
