"""Records the time of each step of a run once for each settings: a second run finds it done."""

import json
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

from jobs.cli.job import Job
from jobs.cli.state import read_json
from pipelines.storage.objects import write_once


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Time and memory of one step of a run when it was first carried out.

    Attributes:
        verb: the job.
        seconds: of wall time, including the start of its workers.
        peak_memory_mib: of the largest process among this one and its finished children.
    """

    verb: str
    seconds: float
    peak_memory_mib: float


@contextmanager
def record_step(job: Job, verb: str) -> Iterator[None]:
    """Record how long the body takes, unless this step is recorded already."""
    began = time.monotonic()
    yield
    usage = [resource.getrusage(kind) for kind in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    step = StepTime(
        verb=verb,
        seconds=round(time.monotonic() - began, 2),
        peak_memory_mib=round(max(one.ru_maxrss for one in usage) / 1024, 1),
    )
    write_once(_step_url(job, verb), json.dumps(asdict(step)).encode())


def read_step(job: Job, verb: str) -> StepTime | None:
    """The record of a step, or None if it has not been carried out with these settings."""
    record = read_json(_step_url(job, verb))
    if record is None:
        return None
    return StepTime(verb=record["verb"], seconds=record["seconds"], peak_memory_mib=record["peak_memory_mib"])


def _step_url(job: Job, verb: str) -> str:
    return job.url(f"steps/{job.recipe.digest()[:16]}-{verb}.json")
