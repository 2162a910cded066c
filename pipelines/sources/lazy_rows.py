"""A list of rows that is too long for memory: its slices are read as they are used."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, overload

Row = TypeVar("Row")
Other = TypeVar("Other")


class LazyRows(Sequence[Row]):
    """A list whose slices are read from its source; cheapest one after the other.

    Args:
        read: yields the rows from an ordinal on, in order; called again for an ordinal before the last slice.
        count: number of the rows.
    """

    def __init__(self, read: Callable[[int], Iterator[Row]], *, count: int) -> None:
        self._read, self._count = read, count
        self._rows: Iterator[Row] | None = None
        self._position = 0

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...

    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, int):
            return self._range(range(self._count)[index], 1)[0]
        start, stop, step = index.indices(self._count)
        if step != 1:
            raise ValueError(f"a step of {step}; rows of a long list are read one after the other")
        return self._range(start, stop - start)

    def __iter__(self) -> Iterator[Row]:
        return itertools.islice(self._read(0), self._count)

    def map(self, function: Callable[[Row], Other]) -> "LazyRows[Other]":
        """The list of `function` of each row."""

        def read(start: int) -> Iterator[Other]:
            return map(function, self._read(start))

        return LazyRows(read, count=self._count)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_rows": None}

    def _range(self, start: int, count: int) -> list[Row]:
        if self._rows is None or start < self._position:
            self._rows, self._position = self._read(start), start
        # What lies between two slices is read and dropped.
        rows = list(
            itertools.islice(self._rows, start - self._position, start - self._position + max(count, 0))
        )
        self._position = start + len(rows)
        return rows
