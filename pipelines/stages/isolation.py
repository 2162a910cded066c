"""Runs a function in a child process, so that an item that kills or hangs its process is rejected alone.

The child is a fresh interpreter and no fork: a fork of a process with threads, as every Ray worker is, may
inherit locks that nobody releases. It serves many items and is replaced when it dies. Items and results are
sent as pickles over pipes.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import selectors
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Generic, Self, TypeVar

from pipelines.rejections import Rejected

Item = TypeVar("Item")
Result = TypeVar("Result")

_START_SECONDS = 120.0
_LENGTH = struct.Struct("<Q")
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
        tries: how often an item may kill or outlast a child before it is rejected.
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
                rejected = Rejected(
                    "crashed", f"{self._tries} tries, the last ended by {child.exit_reason()}"
                )
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
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
        }
        self._process = subprocess.Popen(
            # -P: the current folder must not shadow modules.
            [sys.executable, "-P", "-c", _CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            bufsize=0,
        )
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
        assert self._process.stdin is not None  # noqa: S101 - for the type checker
        with contextlib.suppress(BrokenPipeError):  # a dead child is noticed when its answer is read
            _send(self._process.stdin, item)
        deadline = time.monotonic() + seconds
        (length,) = _LENGTH.unpack(self._receive(_LENGTH.size, deadline=deadline))
        answer: tuple[bool, Any] = pickle.loads(self._receive(length, deadline=deadline))
        return answer

    def _receive(self, count: int, *, deadline: float) -> bytes:
        assert self._process.stdout is not None  # noqa: S101 - for the type checker
        received = bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while len(received) < count:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError
                if not selector.select(min(left, _POLL_SECONDS)):
                    # No end of file: a process that the function started may hold the pipe open.
                    if self._process.poll() is not None:
                        raise EOFError
                    continue
                piece = os.read(self._process.stdout.fileno(), count - len(received))
                if not piece:
                    raise EOFError
                received += piece
        return bytes(received)

    def exit_reason(self) -> str:
        """The signal or the status that the child ended with."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_EXIT_SECONDS)
        self._process.kill()  # if it only closed its pipe
        code = self._process.wait()
        return signal.Signals(-code).name if code < 0 else f"exit status {code}"

    def kill(self) -> None:
        """Kill the child and close its pipes."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


def _send(pipe: IO[bytes], value: object) -> None:
    data = pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
    view = memoryview(_LENGTH.pack(len(data)) + data)
    while view:
        view = view[pipe.write(view) :]


def _serve() -> None:
    """Main loop of the child: reads the function, then items until the parent closes the pipe."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb", buffering=0)
    # Output that the function or a C library prints must not mix with the answers.
    os.dup2(2, 1)
    # Ctrl-C reaches the whole process group; only the parent handles it, and ends the child.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        function, timeout = _read(requests)
    except EOFError:
        return
    except Exception as error:  # noqa: BLE001 - unpickling imports modules, which may raise anything
        _answer(answers, succeeded=False, value=error)
        return
    _answer(answers, succeeded=True, value=None)
    # If the parent was killed while the child hangs, even in C code, the kernel ends it by this alarm.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    while True:
        try:
            item = _read(requests)
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_REAL, 2 * timeout + 1)
        try:
            result = function(item)
        except Exception as error:  # noqa: BLE001 - the parent raises it again
            _answer(answers, succeeded=False, value=error)
        else:
            _answer(answers, succeeded=True, value=result)
        signal.setitimer(signal.ITIMER_REAL, 0)


def _read(pipe: IO[bytes]) -> Any:  # noqa: ANN401 - any item
    header = pipe.read(_LENGTH.size)
    if len(header) < _LENGTH.size:
        raise EOFError
    return pickle.loads(pipe.read(*_LENGTH.unpack(header)))


def _answer(pipe: IO[bytes], *, succeeded: bool, value: object) -> None:
    try:
        # Loaded as well: an exception may pickle and still fail to load, which would confuse the parent.
        pickle.loads(pickle.dumps(value))
    except Exception as error:  # noqa: BLE001 - any object may fail to pickle in any way
        succeeded, value = False, RuntimeError(f"{value!r} cannot be sent to the parent: {error}")
    _send(pipe, (succeeded, value))
