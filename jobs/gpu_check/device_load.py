"""Samples how busy the device is while other processes work."""

import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from jobs.gpu_check.settings import CheckSize

_SECONDS = 0.2
_CPU_TIMES = Path("/proc/stat")
_QUERY = ("nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "--id=0")


class DeviceLoad:
    """Share of time in which the device is busy, within the context.

    Of a CUDA device it is what nvidia-smi reports, the share of a sample period in which a kernel ran; of the
    CPU the load of all cores.
    """

    def __init__(self, size: CheckSize) -> None:
        self._read = _cuda_load if size.device == "cuda" else _CpuLoad()
        self._samples = list[float]()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=_sample, args=(self._read, self._samples, self._ended))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    @property
    def busy_share(self) -> float | None:
        """Mean from the first to the last sample with any work: 0 .. 1; None if it cannot be read."""
        busy = [number for number, sample in enumerate(self._samples) if sample > 0.0]
        if not busy:
            return None
        between = self._samples[busy[0] : busy[-1] + 1]
        return sum(between) / len(between)


def _sample(read: Callable[[], float], samples: list[float], ended: threading.Event) -> None:
    while not ended.wait(_SECONDS):
        samples.append(read())


def _cuda_load() -> float:
    if shutil.which(_QUERY[0]) is None:
        return 0.0
    answer = subprocess.run(_QUERY, capture_output=True, text=True, check=False).stdout.strip()
    return float(answer) / 100.0 if answer.isdigit() else 0.0


class _CpuLoad:
    """Share of the cores' time since the call before that was not idle."""

    def __init__(self) -> None:
        self._before = self._times()

    def __call__(self) -> float:
        now, before = self._times(), self._before
        self._before = now
        idle, total = (after - earlier for after, earlier in zip(now, before, strict=True))
        return 1.0 - idle / total if total else 0.0

    @staticmethod
    def _times() -> tuple[int, int]:
        """Idle and all time of the cores, in ticks."""
        ticks = [int(word) for word in _CPU_TIMES.read_text().splitlines()[0].split()[1:]]
        return ticks[3] + ticks[4], sum(ticks)
