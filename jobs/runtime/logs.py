"""Logs what commands report: plain lines on stdout, or JSON lines for collectors of logs."""

import json
import logging
import sys
import time
from datetime import UTC, datetime

logger = logging.getLogger("snapfusion")
"""The logger of all commands."""


class _Stdout(logging.Handler):
    """Prints to the current `sys.stdout`, which a progress display or a test may have replaced."""

    json_lines = False
    last_line = 0.0

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        text = record.getMessage()
        if self.json_lines:
            when = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
            text = json.dumps({"time": when, "level": record.levelname.lower(), "message": text.strip()})
        print(printable(text), flush=True)
        self.last_line = time.monotonic()


def printable(text: str) -> str:
    """The text with escapes for what UTF-8 cannot encode, as names of files may have it."""
    return text.encode("utf-8", "backslashreplace").decode()


_handler = _Stdout()
logger.addHandler(_handler)
logger.setLevel(logging.INFO)
logger.propagate = False


def log_as_json(enabled: bool) -> None:
    """Choose between JSON lines and plain lines for the rest of the process."""
    _handler.json_lines = enabled


def seconds_since_last_line() -> float:
    """Seconds since the last line of the log."""
    return time.monotonic() - _handler.last_line


def interactive() -> bool:
    """Whether somebody watches: stdout is a terminal, and lines are not for a collector."""
    return sys.stdout.isatty() and not _handler.json_lines
