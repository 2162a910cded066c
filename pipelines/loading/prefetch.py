"""Prefetches the items of an iterator in a thread."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, Self, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """The items of `source`, up to `depth` of them computed ahead.

    An error in `source` is raised in place of its item. `close` ends the thread.

    Args:
        source: runs on the thread alone.
        depth: most items that are ready at a time.
        interrupt: called by `close`, to end a wait in `source`.
    """

    def __init__(
        self, source: Iterator[T], *, depth: int, interrupt: Callable[[], None] = lambda: None
    ) -> None:
        self._source, self._interrupt = source, interrupt
        # One thread: an iterator computes its items one after the other, and in order.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        # One more than are to be ready is being computed.
        self._items = deque(self._thread.submit(next, source) for _ in range(depth + 1))

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> T:
        if not self._items:
            raise StopIteration
        item = self._items.popleft()
        self._items.append(self._thread.submit(next, self._source))
        return item.result()

    def close(self) -> None:
        """End the thread; items that are ready are dropped."""
        self._items.clear()
        self._interrupt()
        self._thread.shutdown(cancel_futures=True)
        self._source = iter(())  # dropping a generator closes its files and thread pools
