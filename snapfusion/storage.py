"""Folders of any store by their literal names: fsspec's own calls take [, ], * and ? for patterns."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import fsspec
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

_IO_THREADS: Final = 8


def store_of(url: str) -> tuple[AbstractFileSystem, str]:
    """The store of a URL, and the path in it.

    Raises:
        ValueError: if fsspec knows no such store, or its package is not installed.
    """
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise ValueError(f"{url}: {error}") from None


def remove_tree(fs: AbstractFileSystem, path: str) -> None:
    """Delete a folder with everything below it.

    Args:
        fs: the store.
        path: of the folder in it.
    """
    if isinstance(fs, LocalFileSystem):
        shutil.rmtree(path)
        return
    for file in fs.find(path):
        fs.rm_file(file)


def get_tree(fs: AbstractFileSystem, path: str, folder: Path) -> None:
    """Copy all files below a folder of a store into a local folder, which is created.

    Args:
        fs: the store.
        path: of the folder in it.
        folder: local.
    """
    root = path.rstrip("/")

    def get(file: str) -> None:
        target = folder / file.removeprefix(root).lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        fs.get_file(file, str(target))

    with ThreadPoolExecutor(_IO_THREADS) as threads:
        list(threads.map(get, fs.find(root)))
