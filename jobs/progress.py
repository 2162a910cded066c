"""One line that says how far a job is: rewritten on a terminal, repeated every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from pipelines.intake import OnProgress, Progress

_SECONDS_BETWEEN_LINES = 10.0


def show(verb: str, *, stream: TextIO | None = None) -> OnProgress:
    """A callback that shows progress with rate and time left."""
    out = stream or sys.stdout
    on_terminal = out.isatty()
    last = 0.0

    def on_progress(progress: Progress) -> None:
        nonlocal last
        finished = progress.total is not None and progress.rows >= progress.total
        if not on_terminal and not finished and time.monotonic() - last < _SECONDS_BETWEEN_LINES:
            return
        last = time.monotonic()
        line = f"  {verb}: {describe(progress)}"
        out.write(
            f"\r\x1b[K{line}"
            if on_terminal and not finished
            else f"\r{line}\n"
            if on_terminal
            else f"{line}\n"
        )
        out.flush()

    return on_progress


def describe(progress: Progress) -> str:
    """Rows, rate, time left and rejected rows, in words."""
    total = f"/{progress.total}" if progress.total is not None else ""
    words = [f"{progress.rows}{total} rows"]
    if progress.rate:
        words.append(f"{progress.rate:.1f} rows/s")
    if progress.seconds_left:
        words.append(f"{duration(progress.seconds_left)} left")
    if progress.rejected:
        words.append(f"{progress.rejected} rejected")
    return ", ".join(words)


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
