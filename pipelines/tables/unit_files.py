"""The data files of a table's units: their names, and all files of one version, kept as columns."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_SUFFIX: Final = ".parquet"
_REVISION_MARK: Final = "~"
_ITERATED_AT_ONCE: Final = 4096


@dataclass(frozen=True, kw_only=True)
class UnitFile:
    """The committed data file of a unit: its path, rows and bytes.

    A file that replaced the unit's first one has a revision in its name (see `revised_name`).
    """

    unit: str
    path: str
    rows: int
    size: int

    @property
    def revision(self) -> str:
        """The revision in the file's name; empty for the file that the unit was first committed with."""
        return _split_name(self.path)[1]

    def has_manifest(self, manifest: str) -> bool:
        """Whether a manifest, as canonical JSON, is that of this file and not of one that it replaced."""
        return self.revision in ("", revision_of(manifest))


def revised_name(unit: str, manifest: str) -> str:
    """The name of a file that replaces a unit's earlier one: `<unit>~<revision>.parquet`.

    The revision follows from the manifest, so whoever writes the same content writes it under the same name.
    """
    return f"{unit}{_REVISION_MARK}{revision_of(manifest)}{_SUFFIX}"


def revision_of(manifest: str) -> str:
    """The first 16 digits of the SHA-256 of a manifest as canonical JSON."""
    return hashlib.sha256(manifest.encode()).hexdigest()[:16]


def unit_of(path: str) -> str:
    """The unit that a data file belongs to, by its name."""
    return _split_name(path)[0]


def units_of(names: pa.StringArray) -> pa.StringArray:
    """The units that data files belong to, by their names."""
    # A million names are not split one by one, and few tables have a revised file.
    if pc.all(pc.ends_with(names, _SUFFIX)).as_py() and not pc.any(has_revision(names)).as_py():
        return pc.utf8_slice_codeunits(names, 0, -len(_SUFFIX))
    return pa.array([unit_of(name) for name in names.to_pylist()], pa.string())


def has_revision(names: pa.StringArray) -> pa.BooleanArray:
    """Whether each data file replaced its unit's first one."""
    return pc.match_substring(names, _REVISION_MARK)


def _split_name(path: str) -> tuple[str, str]:
    unit, _, revision = path.rpartition("/")[2].removesuffix(_SUFFIX).partition(_REVISION_MARK)
    return unit, revision


def sorted_order(texts: pa.StringArray) -> pa.Int64Array:
    """The indices that sort texts by their bytes, as Python sorts strings: int64 [n]."""
    lengths = pc.binary_length(texts)
    if not len(texts) or texts.null_count or pc.min(lengths) != pc.max(lengths) or not lengths[0].as_py():
        return pc.sort_indices(texts).cast(pa.int64())
    # Names of a million units differ in a few digits, and the first eight of them mostly decide.
    length, (_, _, data) = lengths[0].as_py(), texts.buffers()
    first = np.frombuffer(texts.buffers()[1], np.int32)[texts.offset]
    table = np.frombuffer(data, np.uint8)[first : first + length * len(texts)].reshape(-1, length)
    varying = np.flatnonzero((table != table[0]).any(axis=0))
    words = np.zeros((len(texts), -(-max(len(varying), 1) // 8) * 8), np.uint8)
    words[:, : len(varying)] = table[:, varying]
    numbers = words.view(">u8").astype(np.uint64)
    order = np.argsort(numbers[:, 0], kind="stable")
    if numbers.shape[1] > 1 and (np.diff(numbers[order, 0]) == 0).any():
        order = np.lexsort(numbers.T[::-1])
    return pa.array(order, pa.int64())


class UnitList(Sequence[UnitFile]):
    """The files of one version of a table, ordered by unit: columns, of which files are made on use.

    Of a million units each takes about sixty bytes, and pickled fewer.

    Args:
        url: of the table.
        names: of the files in the table's folder, in the order of their units.
        rows: of each file, int64 [n].
        sizes: bytes of each file, int64 [n].
    """

    def __init__(self, url: str, *, names: pa.StringArray, rows: np.ndarray, sizes: np.ndarray) -> None:
        self._url, self.names, self.rows, self.sizes = url, names, rows, sizes

    @classmethod
    def in_order(cls, url: str, *, names: pa.StringArray, rows: pa.Array, sizes: pa.Array) -> UnitList:
        """The files in order of their units, given in the order of arrival, which is the log's own."""
        order = sorted_order(units_of(names))
        rows, sizes = rows.take(order).to_numpy(), sizes.take(order).to_numpy()
        return cls(url, names=names.take(order), rows=rows, sizes=sizes)

    def __reduce__(self) -> tuple[Any, ...]:
        batch = pa.record_batch([self.names, self.rows, self.sizes], ["name", "rows", "size"])
        # Names of neighbours differ in a few digits, so little of them is left.
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, batch.schema, options=options) as stream:
            stream.write_batch(batch)
        return _unpacked, (self._url, sink.getvalue().to_pybytes())

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, index: int) -> UnitFile: ...

    @overload
    def __getitem__(self, index: slice) -> UnitList: ...

    def __getitem__(self, index: int | slice) -> UnitFile | UnitList:
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        if index < -len(self) or index >= len(self):
            raise IndexError(f"{index} of {len(self)} units")
        index %= len(self)
        return self._file(self.names[index].as_py(), self.rows[index], self.sizes[index])

    def __iter__(self) -> Iterator[UnitFile]:
        for start in range(0, len(self), _ITERATED_AT_ONCE):
            part = slice(start, start + _ITERATED_AT_ONCE)
            yield from map(self._file, self.names[part].to_pylist(), self.rows[part], self.sizes[part])

    def take(self, indices: np.ndarray) -> UnitList:
        """The units of these indices, int64 [m], in this order."""
        names = self.names.take(pa.array(indices, pa.int64()))
        return UnitList(self._url, names=names, rows=self.rows[indices], sizes=self.sizes[indices])

    def positions_in(self, names: pa.StringArray) -> pa.Int64Array:
        """Where each file stands among these names; null for a file that is not among them."""
        # As a rule all units are recorded, each once; then no hash table is needed.
        if len(names) == len(self) and not names.null_count:
            order = sorted_order(names)
            if names.take(order).equals(self.names):
                return order
        return pc.index_in(self.names, value_set=names).cast(pa.int64())

    @property
    def unit_names(self) -> pa.StringArray:
        """The names of the units."""
        return units_of(self.names)

    @property
    def num_rows(self) -> int:
        """Rows in all files."""
        return int(self.rows.sum())

    def _file(self, name: str, rows: np.int64, size: np.int64) -> UnitFile:
        return UnitFile(unit=unit_of(name), path=f"{self._url}/{name}", rows=int(rows), size=int(size))


def _unpacked(url: str, data: bytes) -> UnitList:
    """The list that `UnitList.__reduce__` has packed."""
    # One batch as it is: joining chunks would copy them.
    names, rows, sizes = pa.ipc.open_stream(data).read_next_batch().columns
    return UnitList(url, names=names, rows=rows.to_numpy(), sizes=sizes.to_numpy())
