"""The Ray cluster a job runs on: the one it was submitted to, or one of its own on this machine."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import ray

from jobs.credentials import for_workers
from pipelines.execution import Runner, Stage, on_ray
from pipelines.grouping import RayRows, Read, read_on_ray
from snapfusion.settings import Settings

# Two cores carry a reader, a network, a writer and a trainer: logical CPUs only say who may run beside whom.
_LEAST_CPUS = 4

_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_ENABLE_V2": "1",
    "DIFFUSERS_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}


class Cluster(Settings):
    """Where to run.

    Attributes:
        address: of a running cluster, or None: the one this job was submitted to, else a local one.
        cpus: logical CPUs of a local one; None takes the machine's, at least four.
        worker_logs: whether the workers' own output is shown here.
    """

    address: str | None = None
    cpus: int | None = None
    worker_logs: bool = False


def runner(cluster: Cluster) -> Runner:
    """`on_ray` on this cluster, to which it connects only if there is something to run."""

    def run(items: Iterable[Any], stages: list[Stage]) -> Iterator[Any]:
        waiting = list(items)
        if waiting:
            connect(cluster)
            yield from on_ray(waiting, stages)

    return run


def reader(cluster: Cluster) -> Read:
    """`read_on_ray` on this cluster, to which it connects only if there is something to read."""

    def read(things: Sequence[Any], function: Callable[[Any], pa.Table]) -> RayRows:
        connect(cluster)
        return read_on_ray(things, function)

    return read


def connect(cluster: Cluster) -> None:
    """Connect this process to Ray for the rest of its life, unless it is connected already."""
    if ray.is_initialized():
        return
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    if not address and not cluster.worker_logs:
        # Its C++ core announces on every pool of actors what would be wrong if their arguments got lost.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    cpus = cluster.cpus or max(os.cpu_count() or 1, _LEAST_CPUS)
    with _sigterm_kept():
        _init(address, cpus=cpus, worker_logs=cluster.worker_logs)


def _init(address: str | None, *, cpus: int, worker_logs: bool) -> None:
    ray.init(
        # Without "local" Ray would join whatever cluster it finds on this machine.
        address=address or "local",
        num_cpus=None if address else cpus,
        include_dashboard=None if address else False,
        logging_level=logging.ERROR,
        log_to_driver=worker_logs,
        # The workers of a local cluster inherit this process's environment.
        runtime_env=for_workers(_QUIET) if address else None,
    )


@contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Ray takes SIGTERM for itself, twice: Python's, and below it its core, which prints its own stack."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)
