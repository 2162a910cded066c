"""Runs a function on one item at a time in a child process, so that an item may kill or hang only that.

The child is a fresh interpreter and no fork: a fork of a process with threads, as every Ray worker is, may
hold locks that nobody will release. It stays for many items and is replaced when it dies. Items and results
travel as pickles over pipes.
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
from types import TracebackType
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
    """`function` behind a process boundary; close it, or use it in a `with` statement.

    Args:
        function: anything that pickles by name: a module's function, or `functools.partial` of one.
        timeout: seconds that one try may take.
        tries: how often an item may end or outlast a child before it is rejected.
    """

    def __init__(self, function: Callable[[Item], Result], *, timeout: float = 60.0, tries: int = 3) -> None:
        if timeout <= 0 or tries < 1:
            raise ValueError(f"timeout {timeout} and tries {tries} given; above 0 and at least 1 is accepted")
        self._function = function
        self._timeout = timeout
        self._tries = tries
        self._child: _Child | None = None

    def __call__(self, item: Item) -> Result:
        """`function(item)`, or the exception that it raised.

        Raises:
            Rejected: `crashed` or `timed_out`, as the last try ended.
            IsolationError: if no child can be started.
        """
        verdict = Rejected("crashed")
        for _ in range(self._tries):
            child = self._child = self._child or _Child(self._function, timeout=self._timeout)
            try:
                succeeded, value = child.ask(item, seconds=self._timeout)
            except TimeoutError:
                verdict = Rejected("timed_out", f"{self._tries} tries of {self._timeout:g} s")
            except EOFError:
                verdict = Rejected("crashed", f"{self._tries} tries, the last ended by {child.ending()}")
            except BaseException:
                self.close()  # or its answer would be taken for the next item's
                raise
            else:
                if succeeded:
                    return value
                raise value
            self.close()
        raise verdict

    def close(self) -> None:
        """End the child; the next call starts another."""
        if self._child is not None:
            self._child.end()
            self._child = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Child:
    """A child process that is ready to be asked."""

    def __init__(self, function: Callable[..., Any], *, timeout: float) -> None:
        # The child looks for modules where this process does, and the parent's standard input stays its own.
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
        }
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            bufsize=0,
        )
        try:
            started, fault = self.ask((function, timeout), seconds=_START_SECONDS)
        except (EOFError, TimeoutError):
            self.end()
            raise IsolationError(f"the child did not start: {self.ending()}") from None
        except BaseException:
            self.end()
            raise
        if not started:
            self.end()
            raise IsolationError(f"the function cannot be loaded in a child process: {fault}")

    def ask(self, item: object, *, seconds: float) -> tuple[bool, Any]:
        """Whether it succeeded, and the result or the exception.

        Raises:
            EOFError: if the child died.
            TimeoutError: if it did not answer in time.
        """
        assert self._process.stdin is not None  # noqa: S101 - for the type checker
        with contextlib.suppress(BrokenPipeError):  # its death shows when the answer is read
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
                    # A process that the function left behind can hold the pipe open after the child's death.
                    if self._process.poll() is not None:
                        raise EOFError
                    continue
                piece = os.read(self._process.stdout.fileno(), count - len(received))
                if not piece:
                    raise EOFError
                received += piece
        return bytes(received)

    def ending(self) -> str:
        """How the child ended, in words."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_EXIT_SECONDS)
        self._process.kill()  # if it only closed its pipe
        code = self._process.wait()
        return signal.Signals(-code).name if code < 0 else f"exit status {code}"

    def end(self) -> None:
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
    """The child's life: the function first, then items until the parent closes the pipe."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb", buffering=0)
    # Whatever the function or a C library prints must not mix with the answers.
    os.dup2(2, 1)
    # Ctrl-C is for the parent, which closes the pipe or kills the child.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        function, timeout = _read(requests)
    except EOFError:
        return
    except Exception as error:  # noqa: BLE001 - unpickling imports modules, which may raise anything
        _answer(answers, succeeded=False, value=error)
        return
    _answer(answers, succeeded=True, value=None)
    # A child that hangs when its parent was killed is ended by the kernel, even inside C code.
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
        pickle.loads(pickle.dumps(value))
    except Exception as error:  # noqa: BLE001 - any object may fail to pickle in any way
        succeeded, value = False, RuntimeError(f"{value!r} cannot be sent to the parent: {error}")
    _send(pipe, (succeeded, value))
