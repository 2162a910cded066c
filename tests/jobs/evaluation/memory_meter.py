"""The memory that this process and all that come from it hold together, while something runs."""

import contextlib
import os
import threading
import time
from pathlib import Path
from typing import Self

from ray_nodes import descendants

_GIB = 2**30
_SECONDS = 2.0


class MemoryMeter:
    """Within it, the peak of the proportional set sizes is followed; a page that n share counts 1/n each."""

    def __init__(self) -> None:
        self.peak_gib = 0.0
        self.seconds = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.monotonic() - self._began
        self._ended.set()
        self._thread.join()

    def _follow(self) -> None:
        while not self._ended.wait(_SECONDS):
            family = [os.getpid(), *descendants(os.getpid())]
            self.peak_gib = max(self.peak_gib, sum(map(_bytes, family)) / _GIB)


def available_gib() -> float:
    """Memory that the machine can still give."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024 / _GIB


def _bytes(process: int) -> int:
    with contextlib.suppress(OSError):
        for line in (Path("/proc") / str(process) / "smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0
