"""Runs a function in a child process, so that an item that kills or hangs its process is rejected alone.

The child is a fresh interpreter and no fork: a fork of a process with threads, as every Ray worker is, may
inherit locks that nobody releases. It serves many items and is replaced when it dies. Items and results are
sent as pickles over a pair of sockets.
"""

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

from pipelines.rejections import Rejected

Item = TypeVar("Item")
Result = TypeVar("Result")

_START_SECONDS = 120.0
_EXIT_SECONDS = 2.0
_POLL_SECONDS = 0.2
_CHILD = "import sys; from pipelines.stages.isolation import _serve; _serve()"


class IsolationError(RuntimeError):
    """The child cannot be started: a fault of the installation or of the function, not of an item."""


class Isolation(Generic[Item, Result]):
    """Calls `function` in a child process; close it, or use it in a `with` statement.

    Args:
        function: anything that pickles by name: a module's function, or `functools.partial` of one.
        timeout: seconds that one try may take.
        tries: deaths or time-outs of a child, before its item is rejected.
    """

    def __init__(self, function: Callable[[Item], Result], *, timeout: float = 60.0, tries: int = 3) -> None:
        if timeout <= 0 or tries < 1:
            raise ValueError(f"timeout is {timeout} and tries {tries}; above 0 and at least 1 is accepted")
        self._function = function
        self._timeout = timeout
        self._tries = tries
        self._child: _Child | None = None

    def __call__(self, item: Item) -> Result:
        """The result of `function(item)`; raises the exception that it raised.

        Raises:
            Rejected: `crashed` or `timed_out`, as the last try ended.
            IsolationError: if no child can be started.
        """
        rejected = Rejected("crashed")
        for _ in range(self._tries):
            child = self._child = self._child or _Child(self._function, timeout=self._timeout)
            try:
                succeeded, value = child.call(item, seconds=self._timeout)
            except TimeoutError:
                rejected = Rejected("timed_out", f"{self._tries} tries of {self._timeout:g} s")
            except EOFError:
                reason = child.exit_reason()
                rejected = Rejected("crashed", f"{self._tries} tries, the last ended by {reason}")
            except BaseException:
                self.close()  # its answer may still arrive, and would pass for the next item's
                raise
            else:
                if succeeded:
                    return value
                raise value
            self.close()
        raise rejected

    def close(self) -> None:
        """Kill the child; the next call starts another."""
        if self._child is not None:
            self._child.kill()
            self._child = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Child:
    """A child process that has loaded the function."""

    def __init__(self, function: Callable[..., Any], *, timeout: float) -> None:
        # The child imports modules from where this process does.
        paths = (path or str(Path.cwd()) for path in sys.path)
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        self._connection, inherited = Pipe()
        # -P: the current folder must not shadow modules. The child's output goes to standard error.
        command = [sys.executable, "-P", "-c", _CHILD]
        with inherited:
            self._process = subprocess.Popen(command, stdin=inherited.fileno(), stdout=2, env=environment)
        try:
            started, error = self.call((function, timeout), seconds=_START_SECONDS)
            if not started:
                raise IsolationError(f"the function cannot be loaded in a child process: {error}")
        except BaseException as failure:
            self.kill()
            if isinstance(failure, EOFError | TimeoutError):
                raise IsolationError(f"the child did not start: {self.exit_reason()}") from None
            raise

    def call(self, item: object, *, seconds: float) -> tuple[bool, Any]:
        """Whether the call succeeded, and its result or exception.

        Raises:
            EOFError: if the child died.
            TimeoutError: if it did not answer in time.
        """
        request = pickle.dumps(item, protocol=pickle.HIGHEST_PROTOCOL)
        with contextlib.suppress(ConnectionError):  # a dead child is noticed when its answer is read
            self._connection.send_bytes(request)
        deadline = time.monotonic() + seconds
        while not self._connection.poll(max(min(_POLL_SECONDS, deadline - time.monotonic()), 0.0)):
            # No end of file: a process that the function started may hold the connection open.
            if self._process.poll() is not None and not self._connection.poll():
                raise EOFError
            if time.monotonic() >= deadline:
                raise TimeoutError
        try:
            answer: tuple[bool, Any] = pickle.loads(self._connection.recv_bytes())
        except OSError:  # it died in the middle of its answer, or without reading the item
            raise EOFError from None
        return answer

    def exit_reason(self) -> str:
        """The signal or the status that the child ended with."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_EXIT_SECONDS)
        self._process.kill()  # if it only closed its end
        code = self._process.wait()
        return signal.Signals(-code).name if code < 0 else f"exit status {code}"

    def kill(self) -> None:
        """Kill the child and close the connection to it."""
        self._process.kill()
        self._process.wait()
        self._connection.close()


def _serve() -> None:
    """Main loop of the child: reads the function, then items until the parent closes the connection."""
    parent = Connection(os.dup(0))
    # The function must not read from the connection, nor a process that it starts hold it open.
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    # Ctrl-C reaches the whole process group; only the parent handles it, and ends the child.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # If the parent was killed while the child hangs, even in C code, the kernel ends it by an alarm.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    with contextlib.suppress(EOFError, ConnectionError):
        request = parent.recv_bytes()
        try:
            function, timeout = pickle.loads(request)
        except Exception as error:  # noqa: BLE001 - unpickling imports modules, which may raise anything
            _answer(parent, succeeded=False, value=error)
            return
        _answer(parent, succeeded=True, value=None)
        while True:
            item = pickle.loads(parent.recv_bytes())
            signal.setitimer(signal.ITIMER_REAL, 2 * timeout + 1)
            try:
                result = function(item)
            except Exception as error:  # noqa: BLE001 - the parent raises it again
                _answer(parent, succeeded=False, value=error)
            else:
                _answer(parent, succeeded=True, value=result)
            signal.setitimer(signal.ITIMER_REAL, 0)


def _answer(parent: Connection, *, succeeded: bool, value: object) -> None:
    try:
        # Loaded as well: an exception may pickle and still fail to load, which would confuse the parent.
        pickle.loads(pickle.dumps(value))
    except Exception as error:  # noqa: BLE001 - any object may fail to pickle in any way
        succeeded, value = False, RuntimeError(f"{value!r} cannot be sent to the parent: {error}")
    parent.send_bytes(pickle.dumps((succeeded, value), protocol=pickle.HIGHEST_PROTOCOL))
