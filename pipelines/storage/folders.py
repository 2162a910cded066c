"""A folder that appears at its place whole, or not at all."""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path

import fsspec

from pipelines.storage.objects import StorageError, absolute_url, is_local


def publish_folder(folder: Path, url: str, *, last: str) -> None:
    """Copy `folder` to `url`, which must not hold one already.

    On a file system the finished copy is moved into place at once. An object store cannot do that: there the
    file named `last` is put after all others, and a reader takes a folder without it for none.

    Raises:
        StorageError: if the place is taken or cannot be written.
    """
    try:
        if is_local(url):
            _move(folder, Path(absolute_url(url)))
        else:
            _put(folder, absolute_url(url), last=last)
    except OSError as error:
        raise StorageError(f"{url} cannot be written: {error}") from error


def _move(folder: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        shutil.copytree(folder, partial)
        # Fails where there is a folder with something in it, so of two writers one wins.
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _put(folder: Path, url: str, *, last: str) -> None:
    filesystem, root = fsspec.core.url_to_fs(url)
    if filesystem.exists(f"{root}/{last}"):
        raise FileExistsError(f"{last} is there already")
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    for name in sorted(names, key=lambda name: name == last):
        filesystem.pipe_file(f"{root}/{name}", (folder / name).read_bytes())
