"""Records the time of each step of a run once for each settings: a second run finds it done."""

import json
import resource
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from jobs.cli.job import Job
from jobs.cli.state import read_json
from jobs.runtime.driver_clock import DRIVER_CLOCK
from jobs.runtime.network_times import NETWORK_TIMES
from pipelines.storage.objects import list_names, write_once
from pipelines.storage.records import read_record
from snapfusion.records import Record

DONE = "-done.json"
"""End of the name of the file beside the records that says that a whole run is done."""

_PEAK, _PRESENT = "VmHWM", "VmRSS"
_STATUS = Path("/proc/self/status")
_SAMPLE_SECONDS = 0.2


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Time and memory of one step of a run when it was first carried out.

    Attributes:
        verb: the job.
        seconds: of wall time, including the start of its workers.
        peak_memory_mib: of the largest process among this one and its finished children.
        driver_seconds: in which this process worked alone, after its workers; None if it had none.
        driver_peak_mib: of this process during the step; None if it is not known.
        network_busy: share of the time between the first and last units of the workers of its tables in which
            their networks computed; None where none did, or it is not known.
    """

    verb: str
    seconds: float
    peak_memory_mib: float
    driver_seconds: float | None = None
    driver_peak_mib: float | None = None
    network_busy: float | None = None


class _OwnMemory:
    """The peak of this process's resident memory within the context, in MiB; None without /proc.

    The system's own peak counts where it rose meanwhile. It is not reset, as it is that of the whole run, so
    a lower peak is the largest of several samples a second.
    """

    def __enter__(self) -> Self:
        self._sampled, self._before = 0, _resident_kib(_PEAK)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="memory", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def peak_mib(self) -> float | None:
        """The peak so far."""
        peak = _resident_kib(_PEAK)
        if peak == self._before:
            peak = max(self._sampled, _resident_kib(_PRESENT))
        return round(peak / 1024, 1) if peak else None

    def _sample(self) -> None:
        while True:
            self._sampled = max(self._sampled, _resident_kib(_PRESENT))
            if self._ended.wait(_SAMPLE_SECONDS):
                return


@contextmanager
def record_step(job: Job, verb: str) -> Iterator[None]:
    """Record how long the body takes, unless this step is recorded already."""
    DRIVER_CLOCK.reset()
    NETWORK_TIMES.reset()
    began = time.monotonic()
    with _OwnMemory() as memory:
        yield
        driver_seconds, driver_peak = DRIVER_CLOCK.seconds, memory.peak_mib()
    usage = [resource.getrusage(kind) for kind in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    step = StepTime(
        verb=verb,
        seconds=round(time.monotonic() - began, 2),
        peak_memory_mib=round(max(one.ru_maxrss for one in usage) / 1024, 1),
        driver_seconds=None if driver_seconds is None else round(driver_seconds, 2),
        driver_peak_mib=driver_peak,
        network_busy=None if (share := NETWORK_TIMES.busy_share) is None else round(share, 4),
    )
    write_once(_step_url(job, verb), json.dumps(asdict(step)).encode())


def read_step(job: Job, verb: str) -> StepTime | None:
    """The record of a step, or None if it has not been carried out with these settings."""
    record = read_json(_step_url(job, verb))
    return None if record is None else _step_of(record)


def read_steps(job: Job) -> list[StepTime]:
    """The records of all steps in the run's folder, whatever their settings."""
    folder = job.url("steps")
    names = [name for name in list_names(folder) if name.endswith(".json") and not name.endswith(DONE)]
    return [_step_of(read_record(f"{folder}/{name}")) for name in names]


def _step_of(record: Record) -> StepTime:
    return StepTime(
        verb=record["verb"],
        seconds=float(record["seconds"]),
        peak_memory_mib=float(record["peak_memory_mib"]),
        # Not in records of earlier versions.
        driver_seconds=record.get("driver_seconds"),
        driver_peak_mib=record.get("driver_peak_mib"),
        network_busy=record.get("network_busy"),
    )


def _step_url(job: Job, verb: str) -> str:
    return job.url(f"steps/{job.recipe.digest()[:16]}-{verb}.json")


def _resident_kib(name: str) -> int:
    """A size of this process in KiB; 0 without /proc, as on a Mac."""
    if not _STATUS.exists():
        return 0
    return next(int(line.split()[1]) for line in _STATUS.read_text().splitlines() if line.startswith(name))
