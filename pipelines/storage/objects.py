"""Objects on a disk or in any store that fsspec knows: written once, or replaced."""

import contextlib
import errno
import io
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Final

import fsspec

from pipelines.storage.durability import make_folders, sync
from pipelines.storage.retry import with_retries

IO_THREADS: Final = 8
"""Threads for requests about many objects, each of which is a round trip."""
_READ_AHEAD_BYTES: Final = 8 << 20


# fsspec caches listings and would not see what other processes have written since.
for _scheme in ("s3", "gs", "gcs", "abfs", "az"):
    fsspec.config.conf.setdefault(_scheme, {}).setdefault("use_listings_cache", False)

_NOT_IN_TABLE_URLS: Final = frozenset("[]%#?*")
_PACKAGES: Final = {"gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "abfss": "adlfs", "az": "adlfs"}


_NO_HARD_LINKS: Final = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
_NO_HARD_LINKS_MESSAGE: Final = (
    "its file system has no hard links, without which two writers could replace each other's commits; choose "
    "a folder on another file system, or an object store"
)


class StorageError(ValueError):
    """A URL that cannot be read or written; the message says which and why."""


def is_local(url: str) -> bool:
    """Whether `url` is a path of this machine's file system."""
    return "://" not in url or url.startswith("file://")


def local_path(url: str) -> Path:
    """The absolute path of a local URL."""
    return Path(url.removeprefix("file://")).absolute()


def absolute_url(url: str) -> str:
    """A local path made absolute; any other URL without its trailing slash.

    Called once, where a URL enters the program: Ray workers run in another working directory.
    """
    return str(local_path(url)) if is_local(url) else url.rstrip("/")


def check_client(url: str) -> None:
    """Check that the package for the store of `url` is installed, before any work begins.

    Raises:
        StorageError: if it is not installed, or fsspec knows no such store.
    """
    if is_local(url):
        return
    scheme = url.partition("://")[0]
    try:
        fsspec.get_filesystem_class(scheme)
        return
    except ImportError:
        package = _PACKAGES.get(scheme)
        remedy = f"pip install {package}" if package else "install the package that fsspec has for it"
        fault = f"no client for {scheme}:// is installed; {remedy}, on every node"
    except ValueError:
        fault = f"{scheme}:// is no store that fsspec knows; s3://, gs://, abfs:// and paths are accepted"
    raise StorageError(f"{url}: {fault}")


def check_table_url(url: str) -> None:
    """Check that tables can lie at or below `url`, before anything is written there.

    Raises:
        StorageError: for a character that deltalake cannot take literally.
    """
    # It panics at brackets, decodes percent signs, so that a%41 is written to aA, and cuts off # and ?.
    if found := sorted(_NOT_IN_TABLE_URLS.intersection(url)):
        raise StorageError(
            f"{url}: tables can have no {' or '.join(found)} in their path; name the folder otherwise"
        )


def open_object(url: str, *, ahead: int = _READ_AHEAD_BYTES) -> IO[bytes]:
    """Open an object for reading; from a store it arrives `ahead` bytes at a time. The caller closes it.

    If a response breaks off, the missing bytes are requested again: none is read twice or left out.

    Raises:
        FileNotFoundError: if there is no such object.
        OSError: if the store keeps failing, now or while the object is read.
    """
    filesystem, path = fsspec.core.url_to_fs(url)
    if is_local(url):
        plain: IO[bytes] = filesystem.open(path, "rb")
        return plain
    file = with_retries(url, lambda: filesystem.open(path, "rb", block_size=ahead))
    return _RetryingFile(file, url)  # type: ignore[return-value] # it has what readers use of IO[bytes]


class _RetryingFile(io.RawIOBase):
    """A file in a store that repeats a read whose response broke off."""

    def __init__(self, file: IO[bytes], url: str) -> None:
        self._file = file
        self._url = url
        self._position = 0
        self._size: int | None = getattr(file, "size", None)

    def read(self, size: int = -1, /) -> bytes:
        return with_retries(self._url, lambda: self._read(size))

    def _read(self, size: int) -> bytes:
        # A read that broke off has moved the file's own position, so each attempt seeks to ours.
        self._file.seek(self._position)
        data = self._file.read(size)
        if self._size is not None:
            remaining = max(self._size - self._position, 0)
            expected = remaining if size < 0 else min(size, remaining)
            # Some clients return a short response without an error; raising makes it one to retry.
            if len(data) < expected:
                raise OSError(f"{len(data)} of {expected} bytes arrived from byte {self._position} on")
        self._position += len(data)
        return data

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self._file.seek(self._position)
        self._position = self._file.seek(offset, whence)
        return self._position

    def tell(self) -> int:
        return self._position

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()


def write_once(url: str, data: bytes) -> bool:
    """Create the object `url` whole, or not at all; False if there is one already.

    An existing object is never touched, so of two writers one wins and the other gets False. If a remote
    store creates the object and its response is lost, the retry gets False for an object of this very writer:
    callers that must know compare its content.

    Raises:
        StorageError: if it cannot be written.
    """
    with raising_storage_error(url):
        if is_local(url):
            return _write_local(local_path(url), data)
        return with_retries(url, lambda: _write_remote(url, data))


def replace_object(url: str, data: bytes) -> None:
    """Write the object `url`, replacing an earlier one; for views such as a report.

    Raises:
        StorageError: if it cannot be written.
    """
    _replace(
        url,
        local=lambda temporary: temporary.write_bytes(data),
        remote=lambda filesystem, path: filesystem.pipe_file(path, data),
    )


def put_file(file: Path, url: str) -> None:
    """Write the content of a local file to the object `url`, replacing an earlier one.

    The file must not be changed afterwards: on the same disk it is hard-linked.

    Raises:
        StorageError: if the object cannot be written.
    """

    def link(temporary: Path) -> None:
        try:
            os.link(file, temporary)
        except OSError:  # another disk
            shutil.copyfile(file, temporary)

    _replace(url, local=link, remote=lambda filesystem, path: filesystem.put_file(str(file), path))


def _replace(
    url: str, *, local: Callable[[Path], object], remote: Callable[[fsspec.AbstractFileSystem, str], object]
) -> None:
    with raising_storage_error(url):
        if not is_local(url):
            filesystem, path = fsspec.core.url_to_fs(url)
            with_retries(url, lambda: remote(filesystem, path))
            return
        with temporary_beside(local_path(url)) as temporary:
            local(temporary)
            temporary.replace(local_path(url))


def move_object(url: str, to: str) -> None:
    """Rename the object `url` to `to` in the same store, unless there is one of that name.

    Several processes may move the same object at the same time; that `url` is missing is no error if `to`
    exists.

    Raises:
        StorageError: if neither exists, or `to` cannot be written.
    """
    try:
        if is_local(url):
            with contextlib.suppress(FileExistsError):
                _link(local_path(url), local_path(to))
            local_path(url).unlink(missing_ok=True)
        else:
            filesystem, path = fsspec.core.url_to_fs(url)
            _, target = fsspec.core.url_to_fs(to)
            filesystem.invalidate_cache()
            if not filesystem.exists(target):
                filesystem.cp_file(path, target)
            if filesystem.exists(path):
                filesystem.rm_file(path)
    except OSError as error:
        if not exists(to):
            raise StorageError(f"{url} cannot be moved to {to}: {error}") from error


def read_bytes(url: str) -> bytes:
    """The content of an object.

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
    """Whether there is such an object or folder."""
    filesystem, path = fsspec.core.url_to_fs(url)
    return with_retries(url, lambda: bool(filesystem.exists(path)))


def list_names(url: str) -> list[str]:
    """The sorted names of a folder's present entries; none if there is no such folder."""
    filesystem, path = fsspec.core.url_to_fs(url)
    filesystem.invalidate_cache()
    try:
        entries = with_retries(url, lambda: filesystem.ls(path, detail=False))
    except FileNotFoundError:
        return []
    return sorted(str(entry).rpartition("/")[2] for entry in entries)


def list_parquet(url: str) -> list[str]:
    """The names of a folder's whole Parquet files: those that begin with a dot are unfinished."""
    return [name for name in list_names(url) if name.endswith(".parquet") and not name.startswith(".")]


@contextmanager
def raising_storage_error(url: str) -> Iterator[None]:
    """Raise errors of the operating system or a store as a StorageError that names `url`."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{url} cannot be written: {error}") from error


@contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """A hidden file's path in the folder of `path`: on the same disk, so that it can be renamed or linked."""
    make_folders(path.parent)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _write_local(path: Path, data: bytes) -> bool:
    if path.exists():
        return False
    with temporary_beside(path) as temporary:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        try:
            _link(temporary, path)
        except FileExistsError:
            return False
        sync(path.parent)
    return True


def _link(file: Path, to: Path) -> None:
    """Give a file a further name; unlike a rename, this fails if the name is taken.

    Raises:
        FileExistsError: if it is.
        OSError: if the file system has no hard links; the message says so.
    """
    try:
        os.link(file, to)
    except OSError as error:
        if error.errno in _NO_HARD_LINKS:
            raise OSError(_NO_HARD_LINKS_MESSAGE) from error
        raise


def _write_remote(url: str, data: bytes) -> bool:
    filesystem, path = fsspec.core.url_to_fs(url)
    try:
        # A conditional PUT (If-None-Match: *): the store itself refuses a second object of this name.
        filesystem.pipe_file(path, data, mode="create")
    except FileExistsError:
        return False
    return True
