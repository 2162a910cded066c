"""Checks data files as they are read, each file once in a process: a flipped bit is an error and no row.

Files have a CRC-32 of each Parquet page, which covers whatever columns are read. Files written before they
had one are compared with the SHA-256 recorded in `.units`.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from typing import IO, Final

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.storage.faults import plain_text
from pipelines.storage.objects import is_local, local_path
from pipelines.tables.settings import CHECK_FILES_VARIABLE

_HEAD_BYTES: Final = 64
"""Bytes from a file's start that hold the header of its first page."""
_MAGIC_BYTES: Final = 4
# Thrift's compact protocol writes a field as (number - number of the field before) << 4 | type, and type 5 is
# an i32. The header's first three fields are i32s, and so is the fourth, which is the optional CRC.
_I32_FIELD: Final = 0x15

_checked: set[tuple[str, ...]] = set()


class DamagedFileError(OSError):
    """A data file that is not as it was written; the message names it and says what to do.

    Like any `OSError` of a remote store it is worth a retry: the answer may have been damaged on its way.
    """


def read_rows(
    path: str, data: pa.Buffer | IO[bytes], columns: Sequence[str] | None, *, sha256: Callable[[], str | None]
) -> pa.Table:
    """Read rows, and check what is read of the file if it has not been checked before.

    Args:
        path: of the file.
        data: its content, or the open file.
        columns: to read; None for all.
        sha256: returns the recorded SHA-256; None if the file need not be compared with it.

    Raises:
        DamagedFileError: if it was altered.
    """
    key = (path, *(columns or ()))
    check = key not in _checked and os.environ.get(CHECK_FILES_VARIABLE) != "0"
    if check and not has_page_checksums(_head(path, data)) and (recorded := sha256()):
        data = data if isinstance(data, pa.Buffer) else pa.py_buffer(data.read())
        if hashlib.sha256(data).hexdigest() != recorded:
            raise _damaged(path, "its SHA-256 is not the recorded one")
    try:
        rows = _read(path, data, columns, check=check)
    # The operating system's errors have a number, those of Parquet have none.
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise _damaged(path, plain_text(error)) from None
    if check:
        _checked.add(key)
    return rows


def _read(path: str, data: pa.Buffer | IO[bytes], columns: Sequence[str] | None, *, check: bool) -> pa.Table:
    # `pq.read_table` would take twice the time, in a dataset of one file. Ranges are fetched together from a
    # store; of a disk they would be copied once more.
    ahead = not isinstance(data, pa.Buffer) and not is_local(path)
    options = {"pre_buffer": ahead, "page_checksum_verification": check}
    with pq.ParquetFile(_source(path, data), **options) as file:
        if missing := set(columns or ()) - set(file.schema_arrow.names):
            raise pa.ArrowInvalid(f"no column {', '.join(sorted(missing))}")
        rows = file.read(columns, use_threads=False)
    return rows if columns is None else rows.select(columns)


def _source(path: str, data: pa.Buffer | IO[bytes]) -> pa.NativeFile | IO[bytes]:
    if isinstance(data, pa.Buffer):
        return pa.BufferReader(data)
    # Arrow's threads call into a file of Python's, and abort the process if the interpreter ends meanwhile.
    return pa.OSFile(str(local_path(path)), "rb") if is_local(path) else data


def _head(path: str, data: pa.Buffer | IO[bytes]) -> bytes:
    if isinstance(data, pa.Buffer):
        return bytes(data[:_HEAD_BYTES])
    # Not from the open file, which would fetch megabytes ahead from a store.
    filesystem, path_there = fsspec.core.url_to_fs(path)
    return bytes(filesystem.cat_file(path_there, start=0, end=_HEAD_BYTES))


def _damaged(path: str, fault: str) -> DamagedFileError:
    return DamagedFileError(
        f"{path} is damaged: {fault}; restore it from a copy (jobs.verify_table lists all damaged files)"
    )


def has_page_checksums(head: bytes) -> bool:
    """Whether the first page of a Parquet file, whose first bytes are given, has a checksum."""
    position = _MAGIC_BYTES
    for _ in range(3):
        if head[position : position + 1] != bytes([_I32_FIELD]):
            return False
        position += 1
        # A number's bytes have their highest bit set, except for the last one.
        while head[position : position + 1] >= b"\x80":
            position += 1
        position += 1
    return head[position : position + 1] == bytes([_I32_FIELD])
