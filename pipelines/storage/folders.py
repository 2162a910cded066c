"""Publishes a folder as a whole, or not at all."""

import fcntl
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import fsspec

from pipelines.storage.objects import StorageError, is_local, local_path


def publish_folder(folder: Path, url: str, *, last: str) -> None:
    """Copy `folder` to `url`, where no such folder may exist.

    On a file system the finished copy is renamed into place in one step. An object store has no such rename:
    there the file named `last` is written after all others, and readers ignore a folder that lacks it.

    Raises:
        StorageError: if there is a folder already, or it cannot be written.
    """
    try:
        if is_local(url):
            _copy_and_rename(folder, local_path(url))
        else:
            _upload(folder, url.rstrip("/"), last=last)
    except OSError as error:
        raise StorageError(f"{url} cannot be written: {error}") from error


def _copy_and_rename(folder: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_partial(target)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    partial.mkdir()
    with _locked(partial):
        try:
            shutil.copytree(folder, partial, dirs_exist_ok=True)
            # Fails where there is a folder that is not empty, so of two writers one wins.
            partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _remove_partial(target: Path) -> None:
    """Remove what writers of `target` left that were killed: the system has released their locks."""
    name = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{32}}")
    for partial in [path for path in target.parent.iterdir() if name.fullmatch(path.name)]:
        with suppress(OSError), _locked(partial):
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a lock of a folder, which ends with this process; raises OSError if another one holds it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _upload(folder: Path, url: str, *, last: str) -> None:
    filesystem, root = fsspec.core.url_to_fs(url)
    if filesystem.exists(f"{root}/{last}"):
        raise FileExistsError(f"{last} exists already")
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    # An upload that was killed may have left others; those of these names are replaced.
    for path in filesystem.find(root):
        if path.removeprefix(f"{root}/") not in names:
            filesystem.rm_file(path)
    # False sorts before True, so `last` is written at the end.
    for name in sorted(names, key=lambda name: name == last):
        filesystem.pipe_file(f"{root}/{name}", (folder / name).read_bytes())
