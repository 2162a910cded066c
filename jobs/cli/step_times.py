"""How long each step of a run took: written once for each settings, so a second run does not change it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

from jobs.cli.job import Job
from pipelines.storage.objects import exists, read_bytes, write_once


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """One step of a run, as it went when it was first carried out.

    Attributes:
        verb: its name.
        seconds: of wall time, the start of its workers included.
        peak_memory_mib: of the largest process among this one and its finished children.
    """

    verb: str
    seconds: float
    peak_memory_mib: float


@contextmanager
def record_step(job: Job, verb: str) -> Iterator[None]:
    """Record how long the body took, unless this step is recorded already."""
    began = time.monotonic()
    yield
    step = StepTime(
        verb=verb, seconds=round(time.monotonic() - began, 2), peak_memory_mib=round(_peak_memory_mib(), 1)
    )
    write_once(_step_url(job, verb), json.dumps(asdict(step)).encode())


def read_step(job: Job, verb: str) -> StepTime | None:
    """The step as it went, or None if it has not been carried out with these settings."""
    place = _step_url(job, verb)
    return StepTime(**json.loads(read_bytes(place))) if exists(place) else None


def _step_url(job: Job, verb: str) -> str:
    return job.place(f"steps/{job.recipe.digest()[:16]}-{verb}.json")


def _peak_memory_mib() -> float:
    import resource

    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(kind).ru_maxrss for kind in kinds) / 1024
