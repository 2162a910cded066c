"""Progress reports from the workers of a training to the driver, which is blocked until training ends."""

import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import ray

from jobs.runtime.progress import StatusLine, format_duration
from jobs.training.report_queue import ReportQueue
from pipelines.ray_data.execution import on_driver_node

OnReport = Callable[[Mapping[str, Any]], None]
"""Receives a report.

training, step, num_steps, workers, loss, steps_per_second, seconds_left, data_wait
"""

_POLL_SECONDS = 0.5


@contextmanager
def progress_channel(on_report: OnReport) -> Iterator[Any]:
    """An actor with a method `put(report)`; a thread of this process passes each report to `on_report`."""
    queue = on_driver_node(ReportQueue).remote()
    ended = threading.Event()

    def poll() -> None:
        last = False
        while not last:
            # Once more after the end, for reports that came since the last poll.
            last = ended.wait(_POLL_SECONDS)
            for report in ray.get(queue.take.remote()):
                on_report(report)

    thread = threading.Thread(target=poll, name="reports", daemon=True)
    thread.start()
    try:
        yield queue
    finally:
        ended.set()
        thread.join()


def show_reports() -> OnReport:
    """A callback that prints one status line for each training."""
    line = StatusLine()

    def on_report(report: Mapping[str, Any]) -> None:
        line.show(report_line(report), last=report["step"] >= report["num_steps"])

    return on_report


def report_line(report: Mapping[str, Any]) -> str:
    """A report as one line of text."""
    workers = f"{report['workers']} worker{'s' if report['workers'] != 1 else ''}"
    return (
        f"{report['training']} {report['step']}/{report['num_steps']} steps, loss {report['loss']:.5f}, "
        f"{report['steps_per_second']:.1f} steps/s by {workers}, "
        f"{format_duration(report['seconds_left'])} left, {report['data_wait']:.0%} waiting for data"
    )


def seconds_per_step(reports: Sequence[Mapping[str, Any]]) -> float:
    """Mean over two or more reports, without the steps of the first one, which include warm-up."""
    intervals = [
        (report["step"] - previous["step"], report["steps_per_second"])
        for previous, report in itertools.pairwise(reports)
    ]
    return sum(steps / rate for steps, rate in intervals) / sum(steps for steps, _ in intervals)
