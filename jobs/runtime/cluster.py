"""Connects a job to Ray: to the cluster it was submitted to, or to a local one."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from jobs.runtime.credentials import worker_runtime_env
from jobs.runtime.settings import ClusterSettings

if TYPE_CHECKING:
    import pyarrow as pa

    from pipelines.ray_data.execution import PipelineStage, Runner
    from pipelines.ray_data.shuffle import RayRows, Read


# Logical CPUs only decide which actors run at once: two cores carry reader, network, writer and trainer.
_MIN_CPUS = 4

_QUIET_VARIABLES = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_ENABLE_V2": "1",
    "DIFFUSERS_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}


def runner(cluster: ClusterSettings) -> Runner:
    """`run_on_ray` on this cluster, connecting only if there is something to run."""
    from pipelines.ray_data.execution import run_on_ray

    def run(items: Iterable[Any], stages: list[PipelineStage]) -> Iterator[Any]:
        pending = list(items)
        if pending:
            connect(cluster)
            yield from run_on_ray(pending, stages)

    return run


def reader(cluster: ClusterSettings) -> Read:
    """`read_on_ray` on this cluster, connecting only if something is read."""
    from pipelines.ray_data.shuffle import read_on_ray

    def read(items: Sequence[Any], function: Callable[[Any], pa.Table]) -> RayRows:
        connect(cluster)
        return read_on_ray(items, function)

    return read


def connect(cluster: ClusterSettings) -> None:
    """Connect this process to Ray for the rest of its life, unless it is connected already."""
    import ray

    if ray.is_initialized():
        return
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    for name, value in _QUIET_VARIABLES.items():
        os.environ.setdefault(name, value)
    if not address and not cluster.worker_logs:
        # Ray's C++ core logs a warning on lost actor arguments for every pool of actors, where none are lost.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    cpus = cluster.cpus or max(os.cpu_count() or 1, _MIN_CPUS)
    with _preserve_sigterm():
        ray.init(
            # Without "local" Ray would join any cluster that runs on this machine.
            address=address or "local",
            num_cpus=None if address else cpus,
            include_dashboard=None if address else False,
            logging_level=logging.ERROR,
            log_to_driver=cluster.worker_logs,
            # The workers of a local cluster inherit this process's environment.
            runtime_env=worker_runtime_env(_QUIET_VARIABLES) if address else None,
        )


@contextmanager
def _preserve_sigterm() -> Iterator[None]:
    """Restore the handler of SIGTERM, which Ray replaces in Python and in its core (which prints a stack)."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)
