"""Ends a command with one line for what went wrong, and an exit code.

0 done, 1 the work failed (a second try may help), 2 the request cannot be carried out as it stands, 130
interrupted (Ctrl-C), 141 the reader of the output has gone, 143 terminated (SIGTERM, as from `ray job stop`
and from Kubernetes).
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

from jobs.runtime.logs import printable
from pipelines.storage.faults import NO_SPACE, WRONG_PATH, error_number, plain_text

_SIGNALS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
_UNWIND_SECONDS = 10.0


def run_guarded(verb: str, work: Callable[[], None]) -> int:
    """Run `work`; print what goes wrong in one line, and return the exit code.

    The first Ctrl-C or SIGTERM unwinds `work`, for at most `_UNWIND_SECONDS`; the second ends the process
    at once.
    """
    with _catch_signals(verb) as caught:
        try:
            work()
        except KeyboardInterrupt:
            return _end_by(caught[0], verb) if caught else _end_by(signal.SIGINT, verb, silence=False)
        except SystemExit as leaving:
            # Ray's own handler of SIGTERM, which is in force while Ray connects.
            if leaving.code != signal.SIGTERM:
                raise
            return _end_by(signal.SIGTERM, verb)
        except BrokenPipeError:
            # Whoever read our output, as in `... | head`, has seen enough.
            _silence()
            return 128 + signal.SIGPIPE
        except Exception as error:
            code = _exit_code(error)
            if code is None:
                raise
            _print_last(f"{verb}: {plain_text(_root_cause(error))}")
            return code
    return 0


def _end_by(number: int, verb: str, *, silence: bool = True) -> int:
    _print_last(_signal_message(verb, number))
    if silence:
        # Actors are released only after this line, and Ray complains of the very actors that it then ends.
        _silence()
    return 128 + number


def _silence() -> None:
    """Discard all further output of the process."""
    null = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(null, descriptor)


def _print_last(line: str) -> None:
    """Print to stderr after everything on stdout, which may be closed."""
    with suppress(BrokenPipeError):
        sys.stdout.flush()
    print(printable(line), file=sys.stderr, flush=True)


def _signal_message(verb: str, number: int) -> str:
    return f"{verb}: {_SIGNALS[signal.Signals(number)]}; run the same command again to go on"


@contextmanager
def _catch_signals(verb: str) -> Iterator[list[int]]:
    """Numbers of the signals received; the first is raised as KeyboardInterrupt."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught  # Python lets only the main thread set signal handlers.
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    # An ignored signal stays ignored, as Ctrl-C is for what a shell starts in its background.
    before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
    ended = threading.Event()

    def handle(number: int, _frame: FrameType | None) -> None:
        caught.append(number)
        for each in before:
            signal.signal(each, signal.SIG_DFL)
        ended.set()
        raise KeyboardInterrupt

    def enforce() -> None:
        # An exception raised in a signal handler may be lost in a destructor, or leave a lock locked.
        ended.wait()
        if caught:
            time.sleep(_UNWIND_SECONDS)
            os.write(2, f"{_signal_message(verb, caught[0])}\n".encode())
            os._exit(128 + caught[0])

    threading.Thread(target=enforce, name="stopping", daemon=True).start()
    for number in before:
        signal.signal(number, handle)
    try:
        yield caught
    finally:
        ended.set()
        if not caught:
            for number, handler in before.items():
                signal.signal(number, handler)


def exit_process(code: int) -> NoReturn:
    """End the process with this exit code, without running destructors.

    A process that ends normally soon after it read a Delta table is sometimes aborted by native threads of
    its libraries, and a job whose work is committed would count as failed.
    """
    ray = sys.modules.get("ray")
    if ray is not None:
        ray.shutdown()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except BrokenPipeError:
        code = code or 128 + signal.SIGPIPE
    os._exit(code)


def _exit_code(error: BaseException) -> int | None:
    """1 if a second try may help, 2 if the request must be changed, None for a fault of this program."""
    cause, number = _root_cause(error), error_number(error)
    if number in NO_SPACE:
        return 1
    if isinstance(cause, ValueError) or (isinstance(cause, OSError) and number in WRONG_PATH):
        return 2
    return 1 if isinstance(cause, OSError) or _is_ours(cause) else None


def _root_cause(error: BaseException) -> BaseException:
    """The exception that our code raised, maybe in a worker, without the ones that Ray wraps around it."""
    cause = error
    while not _is_ours(cause):
        inner = getattr(cause, "cause", None) or cause.__cause__
        if not isinstance(inner, BaseException):
            break
        cause = inner
    return cause


def _is_ours(error: BaseException) -> bool:
    return type(error).__module__.split(".")[0] in ("jobs", "pipelines", "snapfusion")
