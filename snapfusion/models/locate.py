"""Finding the local folder of a model, after a copy from object storage or a hub if necessary."""

import difflib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from snapfusion.models.errors import ModelError
from snapfusion.models.hub import download
from snapfusion.models.local_folder import INDEX_FILE, MODEL_FOLDER, local_folder
from snapfusion.storage import get_tree, store_of

SINGLE_FILE_SUFFIX = ".safetensors"


def locate(
    source: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    patterns: Sequence[str] | None = None,
) -> Path:
    """Return the local folder of a model, or its single file, after a download if necessary.

    Args:
        source: as of `snapfusion.models.load.load`, without options.
        revision: branch, tag or commit on a hub.
        variant: of the weights to download from a hub.
        patterns: globs of the files to download from a hub; None for all that are read of a model.

    Raises:
        ModelError: if there is no such model.
    """
    if (local := local_folder(source)) is not None:
        return local
    if "://" in source:
        return _fetch_file(source) if source.endswith(SINGLE_FILE_SUFFIX) else _fetch(source)
    folder = Path(source)
    if folder.is_file():
        if folder.suffix != SINGLE_FILE_SUFFIX:
            raise ModelError(f"{source}: of single files only {SINGLE_FILE_SUFFIX} is read; convert it first")
        return folder
    # A hub id has the form of a relative path, so a mistyped path is known by its parent, which exists.
    if folder.is_absolute() or source.startswith(".") or source.count("/") != 1 or folder.parent.is_dir():
        raise ModelError(
            f"there is no model folder or file {source!r}{_nearest(folder)}; give a diffusers folder, a "
            ".safetensors checkpoint, a URL of one, or a hub id"
        )
    return download(source, revision=revision, variant=variant, patterns=patterns)


def locate_file(path: str) -> Path:
    """Return the local path of a safetensors file, after a copy from object storage if necessary.

    Raises:
        ModelError: if there is no such file, or it is not named .safetensors.
    """
    if not path.endswith(SINGLE_FILE_SUFFIX):
        raise ModelError(
            f"{path}: a {SINGLE_FILE_SUFFIX} file is accepted; others may be pickles, which can run code: "
            "convert it first"
        )
    if "://" in path:
        return _fetch_file(path)
    if not Path(path).is_file():
        raise ModelError(f"there is no file {path}")
    return Path(path)


def _nearest(folder: Path) -> str:
    """Suggest the folder beside a missing one whose name is nearest, if one is near."""
    beside = (
        [path.name for path in folder.parent.iterdir() if path.is_dir()] if folder.parent.is_dir() else []
    )
    names = difflib.get_close_matches(folder.name, beside, n=1)
    return f" (is it {str(folder.with_name(names[0]))!r}?)" if names else ""


def _fetch(url: str) -> Path:
    """Copy a folder from object storage to the cache, unless the cache holds its current version."""
    fs, path = store_of(url)
    root = next(
        (root for root in (path, f"{path}/{MODEL_FOLDER}") if fs.exists(f"{root}/{INDEX_FILE}")), None
    )
    if root is None:
        raise ModelError(f"{url} has no {INDEX_FILE}: it is not a diffusers folder")
    files = fs.find(root, detail=True)
    version = [url, *([name, info["size"], str(_version(info))] for name, info in sorted(files.items()))]
    return _cached(version, lambda target: get_tree(fs, root, target))


def _fetch_file(url: str) -> Path:
    """Copy a single-file checkpoint from object storage to the cache, unless its current version is there."""
    fs, path = store_of(url)
    try:
        info = fs.info(path)
    except FileNotFoundError:
        raise ModelError(f"there is no model file {url}") from None

    def copy(target: Path) -> None:
        target.mkdir(parents=True)
        fs.get_file(path, str(target / Path(path).name))

    return _cached([url, info["size"], str(_version(info))], copy) / Path(path).name


def _cached(version: Sequence[object], copy: Callable[[Path], None]) -> Path:
    """Return the cache folder of a version of a model, which `copy` fills if it is not there."""
    cache = os.environ.get("SNAPFUSION_CACHE") or Path.home() / ".cache" / "snapfusion"
    target = Path(cache) / "models" / hashlib.sha256(json.dumps(version).encode()).hexdigest()[:16]
    if not target.is_dir():
        # Copied under a unique name and renamed, so that no process sees an incomplete copy. Of several
        # processes that copy at once, the first to finish wins.
        partial = target.with_name(f"{target.name}.{uuid.uuid4().hex}")
        copy(partial)
        try:
            partial.rename(target)
        except OSError:
            shutil.rmtree(partial)
            if not target.is_dir():
                raise
    return target


def _version(info: Mapping[str, Any]) -> object:
    """Return what changes with an object's content; each kind of store has its own name for it."""
    names = ("ETag", "etag", "md5Hash", "LastModified", "last_modified", "mtime", "created")
    return next((info[name] for name in names if info.get(name)), None)
