"""Shows a job's progress: one line that updates on a terminal, a plain line every 30 seconds elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar

from jobs.runtime.driver_clock import DRIVER_CLOCK
from jobs.runtime.logs import interactive, logger, seconds_since_last_line
from jobs.runtime.network_times import NETWORK_TIMES

if TYPE_CHECKING:
    from rich.status import Status

    from pipelines.tables.committer import CommitProgress

SECONDS_BETWEEN_LINES = 30.0
"""Between the lines of a job whose output is no terminal."""


class _Display:
    """The present activity of the process and its start."""

    status: ClassVar[Status | None] = None
    text: ClassVar[str] = ""
    began: ClassVar[float] = 0.0


class StatusLine:
    """A line of status; its last text stays."""

    def __init__(self) -> None:
        self._shown = -SECONDS_BETWEEN_LINES

    def show(self, text: str, *, last: bool) -> None:
        """Show `text`; off a terminal only every 30 seconds, unless it is the last."""
        now = time.monotonic()
        _Display.text, _Display.began = text, now
        if not last and _Display.status is not None:
            _Display.status.update(f"{text}")
        elif last or now - self._shown >= SECONDS_BETWEEN_LINES:
            logger.info(f"  {text}")
            self._shown = now


@contextmanager
def progress_display(title: str) -> Iterator[None]:
    """Keep a display alive while the body works, so that no step is silent.

    A terminal shows the current step with its seconds; elsewhere a line follows every 30 seconds in which
    nothing else was shown.
    """
    _Display.text, _Display.began = title, time.monotonic()
    ended = threading.Event()
    with _terminal_status() as status:
        _Display.status = status
        beat = threading.Thread(target=_beat, args=(ended,), name="progress", daemon=True)
        beat.start()
        try:
            yield
        finally:
            ended.set()
            beat.join()
            _Display.status = None


def doing(text: str) -> None:
    """Say what begins now: on the status line of a terminal, or as a line elsewhere."""
    StatusLine().show(text, last=False)


def show_status(text: str) -> None:
    """Show what is being done: at once on a terminal; elsewhere only after 30 seconds without a line."""
    _Display.text, _Display.began = text, time.monotonic()
    if _Display.status is not None:
        _Display.status.update(text)
    elif seconds_since_last_line() >= SECONDS_BETWEEN_LINES:
        logger.info(f"  {text}")


@contextmanager
def _terminal_status() -> Iterator[Status | None]:
    if not interactive():
        yield None
        return
    from rich.console import Console

    with Console(highlight=False, markup=False).status("") as status:
        yield status


def _beat(ended: threading.Event) -> None:
    """Show how long the current step has taken, until `ended`."""
    while not ended.wait(1.0):
        seconds = time.monotonic() - _Display.began
        if _Display.status is not None:
            _Display.status.update(f"{_Display.text} ({format_duration(seconds)})")
        elif min(seconds, seconds_since_last_line()) >= SECONDS_BETWEEN_LINES:
            logger.info(f"  {_Display.text}: still at work, {format_duration(seconds)}")


def show_progress(verb: str) -> TableProgress:
    """A callback that shows progress with rate and time left, and counts its rows for Prometheus."""
    return TableProgress(verb)


class TableProgress:
    """See `show_progress`; an `OnProgress` of one table.

    Attributes:
        network_busy: share of the time between the first and last units of the workers in which their network
            computed; None if none did, or not yet two units.
    """

    def __init__(self, verb: str) -> None:
        from pipelines.ray_data.metrics import RowMeter

        self._verb, self._line, self._meter = verb, StatusLine(), RowMeter(verb)
        self._table = NETWORK_TIMES.add_table()
        self.network_busy: float | None = None
        DRIVER_CLOCK.pause()

    def __call__(self, progress: CommitProgress) -> None:
        """Show the progress after a unit."""
        DRIVER_CLOCK.run_from_now()
        self._meter(progress)
        NETWORK_TIMES.update(self._table, progress.network_time)
        self.network_busy = progress.network_time.busy_share
        last = progress.total is not None and progress.rows >= progress.total
        self._line.show(f"{self._verb}: {format_progress(progress)}", last=last)


def format_progress(progress: CommitProgress) -> str:
    """Rows, rate, time left and rejected rows as text."""
    total = f"/{progress.total}" if progress.total is not None else ""
    parts = [f"{progress.rows}{total} rows"]
    if progress.rate:
        parts.append(f"{progress.rate:.1f} rows/s")
    if progress.seconds_left:
        parts.append(f"{format_duration(progress.seconds_left)} left")
    if progress.rejected:
        parts.append(f"{progress.rejected} rejected")
    return ", ".join(parts)


def format_duration(seconds: float) -> str:
    """Seconds as "5 s", "1 min 05 s" or "1 h 01 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
