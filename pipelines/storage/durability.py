"""Brings files and folders of a local disk to the disk itself, so that they outlive a loss of power.

A file's content and its name are two things: the file is synced for the one, its folder for the other. Object
stores acknowledge only what is durable.
"""

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Sync a file's content, or the names in a folder.

    Raises:
        OSError: if the disk cannot, as when it is full.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folders(folder: Path) -> None:
    """Create a folder and those above it, each synced into the one above.

    Raises:
        OSError: if one cannot be created.
    """
    if folder.is_dir():
        return
    make_folders(folder.parent)
    folder.mkdir(exist_ok=True)
    sync(folder.parent)
