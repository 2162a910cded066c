"""Objects that are written once, and views that are replaced, on a disk or in any store fsspec knows."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import uuid
from pathlib import Path
from typing import IO, Final

import fsspec

from pipelines.storage.retry import with_retries

IO_THREADS: Final = 8
"""Threads that ask a store about many objects, each of which is a round trip."""


# Clients remember what they listed, and take what came since for not there. Others write here all the time.
for _scheme in ("s3", "gs", "gcs", "abfs", "az"):
    fsspec.config.conf.setdefault(_scheme, {}).setdefault("use_listings_cache", False)

_PACKAGES: Final = {"gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "abfss": "adlfs", "az": "adlfs"}


class StorageError(ValueError):
    """A place that cannot be read or written; the message says which and why."""


def is_local(url: str) -> bool:
    """Whether `url` is a path of this machine's file system."""
    return "://" not in url or url.startswith("file://")


def absolute_url(url: str) -> str:
    """A local path as an absolute one; any other URL as it is, without a slash at the end."""
    if is_local(url):
        return str(Path(url.removeprefix("file://")).absolute())
    return url.rstrip("/")


def check_client(url: str) -> None:
    """See that objects of such a URL can be reached from here, before any work begins.

    Raises:
        StorageError: if the package that speaks to such a store is not installed, or none is known.
    """
    if is_local(url):
        return
    scheme = url.partition("://")[0]
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError:
        package = _PACKAGES.get(scheme)
        what = f"pip install {package}" if package else "install the package that fsspec has for it"
        raise StorageError(f"{url}: {scheme}:// cannot be reached from here; {what}, on every node") from None
    except ValueError:
        raise StorageError(
            f"{url}: {scheme}:// is no store that fsspec knows; s3://, gs://, abfs:// and paths are accepted"
        ) from None


def open_object(url: str, *, ahead: int) -> IO[bytes]:
    """The object open for reading, to be closed by the caller; from a store it comes `ahead` bytes at a time.

    Where an answer breaks off, what is missing is asked for again: nothing is read twice, or left out.

    Raises:
        FileNotFoundError: if there is none.
        OSError: if the store keeps failing, then or while it is read.
    """
    filesystem, path = fsspec.core.url_to_fs(absolute_url(url))
    if is_local(url):
        plain: IO[bytes] = filesystem.open(path, "rb")
        return plain
    file = with_retries(url, lambda: filesystem.open(path, "rb", block_size=ahead))
    return _RetryingFile(file, url)  # type: ignore[return-value] # of a file, what reading takes


class _RetryingFile(io.RawIOBase):
    """A file in a store, which is asked again for what an answer lacks."""

    def __init__(self, file: IO[bytes], url: str) -> None:
        self._file = file
        self._url = url
        self._place = 0
        self._size: int | None = getattr(file, "size", None)

    def read(self, size: int = -1, /) -> bytes:
        return with_retries(self._url, lambda: self._read(size))

    def _read(self, size: int) -> bytes:
        self._file.seek(self._place)
        data = self._file.read(size)
        if self._size is not None:
            left = max(self._size - self._place, 0)
            due = left if size < 0 else min(size, left)
            if len(data) < due:
                raise OSError(f"{len(data)} of {due} bytes arrived from byte {self._place} on")
        self._place += len(data)
        return data

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        # What was read of an answer that broke off has moved the file's own place.
        self._file.seek(self._place)
        self._place = self._file.seek(offset, whence)
        return self._place

    def tell(self) -> int:
        return self._place

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()


def write_once(url: str, data: bytes) -> bool:
    """Make the object `url` with `data`, whole or not at all; False if it is there already.

    An existing object is never touched: of two writers one wins, and the other is told. Where a remote store
    does as it is asked and its answer is lost, the same writer asks again and is told so of itself: who finds
    the object there looks what it holds.

    Raises:
        StorageError: if the place cannot be written.
    """
    try:
        if is_local(url):
            return _write_local(Path(absolute_url(url)), data)
        return with_retries(url, lambda: _write_remote(url, data))
    except OSError as error:
        raise StorageError(f"{url} cannot be written: {error}") from error


def replace_object(url: str, data: bytes) -> None:
    """Make the object `url` with `data`, in place of what was there: for views such as a report.

    Raises:
        StorageError: if the place cannot be written.
    """
    try:
        if is_local(url):
            path = Path(absolute_url(url))
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
            try:
                temporary.write_bytes(data)
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
        else:
            filesystem, path_there = fsspec.core.url_to_fs(url)
            with_retries(url, lambda: filesystem.pipe_file(path_there, data))
    except OSError as error:
        raise StorageError(f"{url} cannot be written: {error}") from error


def put_file(file: Path, url: str) -> None:
    """Make the object `url` with the content of a local file, in place of what was there.

    The file must not be changed afterwards: on the same disk the two are one.

    Raises:
        StorageError: if the place cannot be written.
    """
    try:
        if is_local(url):
            path = Path(absolute_url(url))
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
            try:
                try:
                    os.link(file, temporary)
                except OSError:  # on another disk
                    shutil.copyfile(file, temporary)
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
        else:
            filesystem, path_there = fsspec.core.url_to_fs(url)
            with_retries(url, lambda: filesystem.put_file(str(file), path_there))
    except OSError as error:
        raise StorageError(f"{url} cannot be written: {error}") from error


def move_object(url: str, to: str) -> None:
    """Give the object `url` the name `to` in the same store, unless there is one of that name already.

    Whoever else moves the same object at the same time does no harm; that the object is gone neither, if it
    arrived.

    Raises:
        StorageError: if neither is there, or the place cannot be written.
    """
    try:
        if is_local(url):
            with contextlib.suppress(FileExistsError):
                os.link(absolute_url(url), absolute_url(to))
            Path(absolute_url(url)).unlink(missing_ok=True)
        else:
            filesystem, path = fsspec.core.url_to_fs(url)
            _, path_there = fsspec.core.url_to_fs(to)
            filesystem.invalidate_cache()
            if not filesystem.exists(path_there):
                filesystem.copy(path, path_there)
            if filesystem.exists(path):
                filesystem.rm_file(path)
    except OSError as error:
        if not exists(to):
            raise StorageError(f"{url} cannot be moved to {to}: {error}") from error


def read_bytes(url: str) -> bytes:
    """The object's content.

    Raises:
        StorageError: if it cannot be read.
    """

    def read() -> bytes:
        with fsspec.open(url, "rb") as file:
            return bytes(file.read())

    try:
        return with_retries(url, read)
    except OSError as error:
        raise StorageError(f"{url} cannot be read: {error}") from error


def exists(url: str) -> bool:
    """Whether the object or folder is there."""
    filesystem, path = fsspec.core.url_to_fs(url)
    return with_retries(url, lambda: bool(filesystem.exists(path)))


def list_names(url: str) -> list[str]:
    """The names of what lies in a folder, as it is now, sorted; none if there is no such folder."""
    filesystem, path = fsspec.core.url_to_fs(absolute_url(url))
    filesystem.invalidate_cache()
    try:
        entries = with_retries(url, lambda: filesystem.ls(path, detail=False))
    except FileNotFoundError:
        return []
    return sorted(str(entry).rpartition("/")[2] for entry in entries)


def list_parquet(url: str) -> list[str]:
    """The names of whole Parquet files in a folder: what begins with a dot is being written, or torn."""
    return [name for name in list_names(url) if name.endswith(".parquet") and not name.startswith(".")]


def _write_local(path: Path, data: bytes) -> bool:
    if path.exists():
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # A link, unlike a rename, fails where the name is taken.
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _write_remote(url: str, data: bytes) -> bool:
    filesystem, path = fsspec.core.url_to_fs(url)
    try:
        filesystem.pipe_file(path, data, mode="create")
    except FileExistsError:
        return False
    return True
