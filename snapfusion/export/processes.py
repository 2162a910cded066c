"""Runs tasks side by side in processes, and reports what they are at."""

import gc
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from snapfusion.export.executorch import set_num_threads

_STATUS_SECONDS = 1.0
"""Between two reports of what is running."""


class LostProcessError(RuntimeError):
    """A process that ended before its task was done; names the tasks that were running."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A function that runs in another process.

    Attributes:
        name: of the task in messages, unique.
        run: called with the results of the tasks `after`; it can be pickled, as its result can.
        after: names of tasks that must be done before.
    """

    name: str
    run: Callable[..., Any]
    after: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How a compilation reports.

    Attributes:
        log: receives a line for each start and end.
        status: receives what is being done, about once a second, to be shown as often as it is useful.
    """

    log: Callable[[str], None]
    status: Callable[[str], None]


def num_processes(*, bytes_each: int) -> int:
    """As many as this process may use cores, and as fit into the memory that is available."""
    return max(1, min(len(os.sched_getaffinity(0)), _available_bytes() // bytes_each))


def _available_bytes() -> int:
    """Memory that this machine, or the container, can still give."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024
    group = Path("/sys/fs/cgroup")
    # Absent outside containers, "max" where there is no limit.
    with suppress(OSError, ValueError, StopIteration):
        limit, current = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        statistics = (group / "memory.stat").read_text().splitlines()
        # Cached files count as used and are given up when memory is needed.
        cached = next(int(line.split()[1]) for line in statistics if line.startswith("inactive_file"))
        available = min(available, limit - current + cached)
    return available


@contextmanager
def worker_processes(count: int) -> Iterator[Executor]:
    """Processes that end with the context, whatever they are doing, and with this process however it ends."""
    # Forked from a server that has the libraries: not from this process, whose threads would be missing.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["snapfusion.export.preload"])
    # Its imports take seconds, in which this process goes on until the first task is submitted.
    forkserver.ensure_running()
    ending, open_end = context.Pipe(duplex=False)
    num_threads = max(1, len(os.sched_getaffinity(0)) // count)
    pool = ProcessPoolExecutor(count, mp_context=context, initializer=_begin, initargs=(ending, num_threads))
    try:
        yield pool
    finally:
        open_end.close()
        pool.shutdown(cancel_futures=True)
        ending.close()


def _begin(ending: Connection, num_threads: int) -> None:
    """Prepare a worker: it ends when the other end of `ending` is closed."""
    # Ctrl-C reaches every process of the terminal; the first one ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(ending,), daemon=True).start()
    # Objects of the libraries are not visited again: collections are shorter, and their memory stays shared.
    gc.freeze()
    torch.set_num_threads(num_threads)
    set_num_threads(num_threads)


def _end_with(ending: Connection) -> None:
    with suppress(EOFError, OSError):
        ending.recv()
    os._exit(1)


def run_tasks(tasks: Sequence[Task], executor: Executor, *, slots: int, progress: Progress) -> dict[str, Any]:
    """Run the tasks, each when a slot is free and those before it are done; returns the results by name.

    Args:
        tasks: earlier ones start first, where both could.
        executor: of the processes.
        slots: number of tasks that run at a time.
        progress: receives each start and end, and what is running.

    Raises:
        LostProcessError: if a process ends before its task is done.
        Exception: the first that a task raises; tasks that have not started are dropped.
    """
    waiting, results = list(tasks), dict[str, Any]()
    running: dict[Future[Any], tuple[Task, float]] = {}
    try:
        while waiting or running:
            ready = [task for task in waiting if results.keys() >= set(task.after)]
            for task in ready[: slots - len(running)]:
                waiting.remove(task)
                progress.log(f"{task.name}: begun")
                inputs = [results[name] for name in task.after]
                running[executor.submit(task.run, *inputs)] = task, time.monotonic()
            done = wait(running, timeout=_STATUS_SECONDS, return_when=FIRST_COMPLETED).done
            if not done:
                progress.status(_describe(running))
            for future in done:
                task, began = running[future]
                results[task.name] = _result(future)
                del running[future]
                progress.log(f"{task.name}: done in {time.monotonic() - began:.0f} s")
    except BrokenProcessPool:
        raise LostProcessError(
            f"a process was ended, as the system does when memory runs out, during {_describe(running)}; "
            "free memory, or use fewer cores (taskset --cpu-list 0), and run the same command again"
        ) from None
    return results


def _result(future: Future[Any]) -> Any:  # noqa: ANN401 - of any task
    try:
        return future.result()
    except ValueError as error:
        # Without the other process's stack, which the executor gives as its cause: the message suffices.
        raise error from None


def _describe(running: Mapping[Future[Any], tuple[Task, float]]) -> str:
    now = time.monotonic()
    return ", ".join(f"{task.name} ({now - began:.0f} s)" for task, began in running.values())
