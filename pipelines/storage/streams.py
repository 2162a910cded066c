"""Writes an object piece by piece, of which a file system or a store then has all or nothing."""

import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import fsspec

from pipelines.storage.durability import make_folders, sync
from pipelines.storage.objects import is_local, local_path, raising_storage_error, temporary_beside
from pipelines.storage.retry import with_retries


class ObjectWriter:
    """The open file of an object that is being written.

    Attributes:
        url: of the object.
        size: bytes so far.
    """

    def __init__(self, url: str, file: IO[bytes]) -> None:
        self.url = url
        self.size = 0
        self._file = file
        self._sha = hashlib.sha256()

    def write(self, data: bytes) -> int:
        """Append bytes.

        Raises:
            StorageError: if they cannot be written.
        """
        with raising_storage_error(self.url):
            written = self._file.write(data)
        self._sha.update(data)
        self.size += len(data)
        return written

    def sha256(self) -> str:
        """SHA-256 of the bytes so far, in hexadecimal digits."""
        return self._sha.hexdigest()


@contextmanager
def write_stream(url: str) -> Iterator[ObjectWriter]:
    """Write the object `url` within the context; it appears, or replaces an earlier one, at the end.

    Until then the bytes are in a hidden file beside it, for a remote store in a temporary file of this
    machine. If the context ends with an error, nothing is left. If the process is killed, the hidden file is
    removed by whoever writes this object next.

    Raises:
        StorageError: if it cannot be written.
    """
    with _local_stream(url) if is_local(url) else _remote_stream(url) as writer:
        yield writer


@contextmanager
def _remote_stream(url: str) -> Iterator[ObjectWriter]:
    with tempfile.NamedTemporaryFile() as file:
        yield ObjectWriter(url, file)
        with raising_storage_error(url):
            file.flush()
            filesystem, path = fsspec.core.url_to_fs(url)
            with_retries(url, lambda: filesystem.put_file(file.name, path))


@contextmanager
def _local_stream(url: str) -> Iterator[ObjectWriter]:
    target = local_path(url)
    with raising_storage_error(url):
        make_folders(target.parent)
        _remove_partial(target)
    with temporary_beside(target) as temporary:
        with raising_storage_error(url):
            file = temporary.open("wb")
            # The system releases the lock of a process that is killed.
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield ObjectWriter(url, file)
            with raising_storage_error(url):
                file.flush()
                os.fsync(file.fileno())
        finally:
            # After an error the buffered rest may not fit either; it is thrown away with the file.
            with suppress(OSError):
                file.close()
        with raising_storage_error(url):
            temporary.replace(target)
            sync(target.parent)


def _remove_partial(target: Path) -> None:
    """Remove the hidden files of writers of `target` that were killed."""
    for path in target.parent.glob(f".{target.name}.*"):
        with suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
