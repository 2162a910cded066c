"""An iterator that is kept a few items ahead by a thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Generic, Self, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """The items of `source`, up to `depth` of them made before they are asked for.

    An error in `source` is raised where its item would have come. `close` ends the thread.

    Args:
        source: run on the thread alone.
        depth: items that wait at most.
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
        """Let the thread end; items that wait are dropped."""
        self._closed.set()
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
        except BaseException as error:  # noqa: BLE001 - whatever it is, it belongs to the reader
            self._ready.put((None, error))
        finally:
            self._source = iter(())  # a generator that is dropped ends what it holds open
