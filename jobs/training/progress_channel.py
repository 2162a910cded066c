"""Reports of a training on their way to whoever started it, whose hands are full with waiting for its end."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import ray

from jobs.runtime.progress import StatusLine, format_duration
from pipelines.ray_data.execution import on_driver_node

OnReport = Callable[[Mapping[str, Any]], None]
"""Takes a report's figures.

training, step, num_steps, workers, loss, steps_per_second, seconds_left, data_wait
"""

_POLL_SECONDS = 0.5


class _ReportQueue:
    """The actor that reports wait in."""

    def __init__(self) -> None:
        self._figures: list[dict[str, Any]] = []

    def put(self, figures: dict[str, Any]) -> None:
        self._figures.append(figures)

    def take(self) -> list[dict[str, Any]]:
        figures, self._figures = self._figures, []
        return figures


@contextmanager
def progress_channel(on_report: OnReport) -> Iterator[Any]:
    """An actor with a method `put(figures)`, which a thread of this process empties into `on_report`."""
    mailbox = on_driver_node(_ReportQueue).remote()
    ended = threading.Event()

    def empty() -> None:
        over = False
        while not over:
            over = ended.wait(_POLL_SECONDS)
            for figures in ray.get(mailbox.take.remote()):
                on_report(figures)

    thread = threading.Thread(target=empty, name="reports", daemon=True)
    thread.start()
    try:
        yield mailbox
    finally:
        ended.set()
        thread.join()


def show_reports() -> OnReport:
    """Shows reports on one line for each training."""
    line = StatusLine()

    def on_report(figures: Mapping[str, Any]) -> None:
        line.show(report_line(figures), last=figures["step"] >= figures["num_steps"])

    return on_report


def report_line(figures: Mapping[str, Any]) -> str:
    """A report in words."""
    workers = f"{figures['workers']} worker{'s' if figures['workers'] != 1 else ''}"
    return (
        f"{figures['training']} {figures['step']}/{figures['num_steps']} steps, loss {figures['loss']:.5f}, "
        f"{figures['steps_per_second']:.1f} steps/s by {workers}, {format_duration(figures['seconds_left'])} left, "
        f"{figures['data_wait']:.0%} waiting for data"
    )


def seconds_per_step(reports: Sequence[Mapping[str, Any]]) -> float:
    """Mean over two or more reports of a training; the first's steps are left out, which set libraries up."""
    pairs = [
        (later["step"] - earlier["step"], later["steps_per_second"])
        for earlier, later in itertools.pairwise(reports)
    ]
    return sum(steps / pace for steps, pace in pairs) / sum(steps for steps, _ in pairs)
