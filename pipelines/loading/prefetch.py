"""Prefetches the items of an iterator in a thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Generic, Self, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """The items of `source`, up to `depth` of them computed ahead.

    An error in `source` is raised in place of its item. `close` ends the thread.

    Args:
        source: runs on the thread alone.
        depth: most items that are ready at a time.
    """

    def __init__(self, source: Iterator[T], *, depth: int) -> None:
        self._source = source
        self._ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(maxsize=depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> T:
        if self._closed.is_set():
            raise StopIteration
        item, error = self._ready.get()
        if error is not None:
            self._closed.set()
            raise error
        return item  # type: ignore[return-value]

    def close(self) -> None:
        """End the thread; items that are ready are dropped."""
        self._closed.set()
        # The thread may be blocked on a full queue, and only then sees that it is to end.
        while self._thread.is_alive():
            try:
                self._ready.get(timeout=0.05)
            except queue.Empty:
                continue

    def _fill(self) -> None:
        try:
            for item in self._source:
                self._ready.put((item, None))
                if self._closed.is_set():
                    return
            self._ready.put((None, StopIteration()))
        except BaseException as error:  # noqa: BLE001 - any error belongs to the consumer
            self._ready.put((None, error))
        finally:
            self._source = iter(())  # dropping a generator closes its files and thread pools
