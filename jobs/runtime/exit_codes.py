"""How a command ends: one line for what went wrong, and an exit code.

0 done, 1 the work failed (a second try may help), 2 the request cannot be carried out as it stands, 130
interrupted (Ctrl-C), 143 terminated (SIGTERM, as from `ray job stop` and from Kubernetes).
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_UNWIND_SECONDS = 10.0
_SIGNAL_WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


def run_guarded(verb: str, work: Callable[[], None]) -> int:
    """Carry out `work`; whatever goes wrong is said in one line, and told in the exit code.

    The first Ctrl-C or SIGTERM unwinds `work`, for so many seconds; the second ends the process where it
    stands.
    """
    with _catch_signals(verb) as heard:
        try:
            work()
        except KeyboardInterrupt:
            return (
                _exit_code_of_signal(verb, heard[0], ending=True)
                if heard
                else _exit_code_of_signal(verb, signal.SIGINT)
            )
        except SystemExit as leaving:
            # Ray's own answer to SIGTERM, which is in force while it connects.
            if leaving.code != signal.SIGTERM:
                raise
            return _exit_code_of_signal(verb, signal.SIGTERM, ending=True)
        except Exception as error:
            cause = _root_cause(error)
            if not isinstance(cause, ValueError) and not _is_ours(cause):
                raise
            _print_last(f"{verb}: {cause}")
            return 2 if isinstance(cause, ValueError) else 1
    return 0


def _exit_code_of_signal(verb: str, number: int, *, ending: bool = False) -> int:
    """The line of a stopped command; of a process that is `ending`, nothing behind it.

    What the work held is let go of afterwards, and Ray may complain of the very actors that it then ends.
    """
    _print_last(_signal_message(verb, number))
    if ending:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in (1, 2):
            os.dup2(nowhere, descriptor)
    return 128 + number


def _print_last(line: str) -> None:
    """Behind all that was printed so far, which a pipe may still wait for."""
    with suppress(BrokenPipeError):
        sys.stdout.flush()
    print(line, file=sys.stderr, flush=True)


def _signal_message(verb: str, number: int) -> str:
    return f"{verb}: {_SIGNAL_WORDS[signal.Signals(number)]}; run the same command again to go on"


@contextmanager
def _catch_signals(verb: str) -> Iterator[list[int]]:
    """Which signals came that ask to stop; the first is raised as KeyboardInterrupt."""
    heard: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield heard  # Python lets no other thread decide about signals
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    # What is ignored stays so, as Ctrl-C is by what a shell started in its background.
    before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
    over = threading.Event()

    def heed(number: int, _frame: FrameType | None) -> None:
        heard.append(number)
        for each in before:
            signal.signal(each, signal.SIG_DFL)
        over.set()
        raise KeyboardInterrupt

    def see_to_it() -> None:
        # An exception that is raised anywhere may be lost in a destructor, or leave a lock locked.
        over.wait()
        if heard:
            time.sleep(_UNWIND_SECONDS)
            os.write(2, f"{_signal_message(verb, heard[0])}\n".encode())
            os._exit(128 + heard[0])

    threading.Thread(target=see_to_it, name="stopping", daemon=True).start()
    for number in before:
        signal.signal(number, heed)
    try:
        yield heard
    finally:
        over.set()
        if not heard:
            for number, handler in before.items():
                signal.signal(number, handler)


def exit_process(code: int) -> NoReturn:
    """End the process with this exit code, and at once.

    Now and then a process that ends in the ordinary way soon after it read a Delta table is aborted by the
    native threads of its libraries, and a job whose work is committed would count as failed.
    """
    ray = sys.modules.get("ray")
    if ray is not None:
        ray.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _root_cause(error: BaseException) -> BaseException:
    """What our code raised, maybe inside a worker: without the layers that Ray puts round it."""
    seen = error
    while not _is_ours(seen):
        inner = getattr(seen, "cause", None) or seen.__cause__
        if not isinstance(inner, BaseException):
            break
        seen = inner
    return seen


def _is_ours(error: BaseException) -> bool:
    return type(error).__module__.split(".")[0] in ("jobs", "pipelines", "snapfusion")
