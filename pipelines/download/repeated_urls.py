"""Finds rows of URL lists whose URL occurred before: exactly, for lists of any size, in bounded memory.

A 16-byte digest of each URL goes to one of 256 files on the local disk, with the row's index: 24 bytes per
row. Equal URLs fall into the same file, and the files are sorted one by one.
"""

import hashlib
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

import numpy as np

_BUCKETS: Final = 256
_ROWS_IN_MEMORY: Final = 1 << 20
_RECORD: Final = np.dtype([("high", "<u8"), ("low", "<u8"), ("row", "<i8")])


def find_repeated_urls(urls: Iterable[str | bytes | None]) -> np.ndarray:
    """The indices, from 0, of URLs that occurred before: int64 [n], ascending. None is no URL.

    URLs are equal if their characters are, apart from white space at the ends.
    """
    with tempfile.TemporaryDirectory(prefix="urls-") as folder:
        for records in _records(urls):
            _scatter(records, Path(folder))
        found = [_repeated_in(Path(folder) / str(bucket)) for bucket in range(_BUCKETS)]
    return np.sort(np.concatenate(found))


def _records(urls: Iterable[str | bytes | None]) -> Iterator[np.ndarray]:
    digests, rows = bytearray(), []
    for row, url in enumerate(urls):
        if not url:
            continue
        text = url.strip() if isinstance(url, bytes) else url.strip().encode("utf-8", "surrogatepass")
        digests += hashlib.blake2b(text, digest_size=16).digest()
        rows.append(row)
        if len(rows) == _ROWS_IN_MEMORY:
            yield _pack(digests, rows)
            digests, rows = bytearray(), []
    yield _pack(digests, rows)


def _pack(digests: bytearray, rows: list[int]) -> np.ndarray:
    records = np.empty(len(rows), _RECORD)
    halves = np.frombuffer(bytes(digests), "<u8").reshape(-1, 2)
    records["high"], records["low"], records["row"] = halves[:, 0], halves[:, 1], rows
    return records


def _scatter(records: np.ndarray, folder: Path) -> None:
    bucket = records["high"] % _BUCKETS
    order = np.argsort(bucket, kind="stable")
    ends = np.searchsorted(bucket[order], np.arange(_BUCKETS + 1))
    for number in range(_BUCKETS):
        part = records[order[ends[number] : ends[number + 1]]]
        if len(part):
            with (folder / str(number)).open("ab") as file:
                file.write(part.tobytes())


def _repeated_in(file: Path) -> np.ndarray:
    if not file.exists():
        return np.empty(0, np.int64)
    records = np.fromfile(file, _RECORD)
    records = records[np.lexsort((records["row"], records["low"], records["high"]))]
    same = (records["high"][1:] == records["high"][:-1]) & (records["low"][1:] == records["low"][:-1])
    return records["row"][1:][same]
