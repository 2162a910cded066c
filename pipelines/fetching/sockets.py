"""Bounds a connection in time and bytes, as far as `http.client` uses sockets."""

import io
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Final, TypeVar

from pipelines.fetching.causes import FetchError

BUFFER_BYTES: Final = 1 << 16

Result = TypeVar("Result")


def seconds_left(deadline: float) -> float:
    """Seconds until `deadline`, by `time.monotonic`.

    Raises:
        TimeoutError: if it has passed.
    """
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def call_until(deadline: float, function: Callable[[], Result]) -> Result:
    """The result of `function()`, or the exception that it raises; for calls that know no timeout.

    Raises:
        TimeoutError: at `deadline`. The call goes on in its thread, which keeps no process from ending.
    """
    future: Future[Result] = Future()

    def work() -> None:
        try:
            future.set_result(function())
        except Exception as error:  # noqa: BLE001 - raised again in the caller
            future.set_exception(error)

    seconds = seconds_left(deadline)
    threading.Thread(target=work, daemon=True).start()
    return future.result(seconds)


class BoundedSocket(io.RawIOBase):
    """A connected socket and the stream of what it receives, with a deadline and a budget of bytes."""

    def __init__(self, connected: socket.socket, *, deadline: float, budget: int) -> None:
        self._socket = connected
        self._deadline = deadline
        self._budget = budget

    def sendall(self, data: bytes) -> None:
        """As of a socket."""
        self._socket.settimeout(seconds_left(self._deadline))
        self._socket.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        """As of a socket, for reading."""
        del mode
        return io.BufferedReader(self, BUFFER_BYTES)

    def readable(self) -> bool:
        """As of a stream."""
        return True

    def readinto(self, buffer: Any, /) -> int:  # noqa: ANN401 - any buffer
        """Read into `buffer`; returns the number of bytes.

        Raises:
            TimeoutError: at the deadline. A socket's own timeout starts anew at every byte.
            FetchError: `too_large` when the budget is used up.
        """
        self._socket.settimeout(seconds_left(self._deadline))
        count = self._socket.recv_into(buffer)
        self._budget -= count
        if self._budget < 0:
            raise FetchError("too_large", "with its headers")
        return count

    def close(self) -> None:
        """Does nothing: `http.client` closes as soon as a response begins, before its body is read."""

    def disconnect(self) -> None:
        """Close the connection."""
        self._socket.close()
