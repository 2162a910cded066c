"""Shows a job's progress in one line: rewritten on a terminal, repeated every few seconds elsewhere."""

import sys
import time
from typing import TextIO

from pipelines.ray_data.metrics import RowMeter
from pipelines.tables.committer import CommitProgress, OnProgress

_SECONDS_BETWEEN_LINES = 10.0


class StatusLine:
    """A line of status; its last text stays."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._out = stream or sys.stdout
        self._on_terminal = self._out.isatty()
        self._shown = 0.0

    def show(self, text: str, *, last: bool) -> None:
        """Show `text`; off a terminal only every few seconds, unless it is the last."""
        now = time.monotonic()
        if self._on_terminal:
            self._out.write(f"\r\x1b[K  {text}" + ("\n" if last else ""))
        elif last or now - self._shown >= _SECONDS_BETWEEN_LINES:
            self._out.write(f"  {text}\n")
            self._shown = now
        self._out.flush()


def show_progress(verb: str) -> OnProgress:
    """A callback that shows progress with rate and time left, and counts its rows for Prometheus."""
    line, meter = StatusLine(), RowMeter(verb)

    def on_progress(progress: CommitProgress) -> None:
        meter(progress)
        last = progress.total is not None and progress.rows >= progress.total
        line.show(f"{verb}: {format_progress(progress)}", last=last)

    return on_progress


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
