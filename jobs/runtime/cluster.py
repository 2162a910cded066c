"""Connects a job to Ray: to the cluster it was submitted to, or to a local one."""

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from jobs.runtime.credentials import worker_runtime_env
from jobs.runtime.resources import Demand, refuse_beyond_machine, wait_for_resources
from jobs.runtime.settings import ClusterSettings
from snapfusion.settings import SettingsError

# Logical CPUs only decide which actors run at once: two cores carry reader, network, writer and trainer.
_MIN_CPUS = 4
_CONNECT_SECONDS = 10.0

_MAX_SOCKET_BYTES = 107
"""Of the path of a socket, on Linux."""
_LONGEST_SOCKET = "/ray/session_2026-01-31_23-59-59_999999_4194304/sockets/plasma_store"
"""Below the folder for temporary files, with the largest number of a process."""

_QUIET_VARIABLES = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_ENABLE_V2": "1",
    "DIFFUSERS_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}


class ClusterUnreachable(RuntimeError):
    """An address at which there is no Ray cluster, or a machine on which none starts."""


def connect(cluster: ClusterSettings, demands: Sequence[Demand] = ()) -> None:
    """Connect this process to Ray for the rest of its life, unless it is connected already.

    Args:
        cluster: its address, or the CPUs of a local one.
        demands: groups of workers that it must be able to run.

    Raises:
        ClusterUnreachable: if there is no cluster at its address, or a local one does not start.
        SettingsError: if a local cluster is too small for the demands.
        ResourcesUnavailable: if a shared one does not offer what they need in time.
    """
    import ray

    address = cluster.address or os.environ.get("RAY_ADDRESS", "")
    if address in ("", "local"):
        cpus = cluster.cpus or max(os.cpu_count() or 1, _MIN_CPUS)
        refuse_beyond_machine(demands, cpus=cpus)
        if not ray.is_initialized():
            _start_local(cpus, worker_logs=cluster.worker_logs)
    else:
        if not ray.is_initialized():
            _join(address, worker_logs=cluster.worker_logs)
        wait_for_resources(demands, minutes=cluster.wait)


def _start_local(cpus: int, *, worker_logs: bool) -> None:
    """Start a cluster of this machine, whose workers inherit this process's environment."""
    import ray

    _check_socket_length()
    _quieten()
    if not worker_logs:
        # Ray's C++ core logs a warning on lost actor arguments for every pool of actors, where none are lost.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    with _preserve_sigterm(), _without_stderr():
        # Without "local" Ray would join any cluster that runs on this machine.
        try:
            ray.init(
                address="local",
                num_cpus=cpus,
                include_dashboard=False,
                logging_level=logging.ERROR,
                log_to_driver=worker_logs,
            )
        except Exception as error:
            if type(error) is not Exception:  # the class with which Ray says that it took too long
                raise
            raise ClusterUnreachable(
                f"Ray did not start on this machine, which may be busy or out of memory; try again ({error})"
            ) from None


def _check_socket_length() -> None:
    """Refuse a folder for temporary files so deep that the names of Ray's sockets become too long.

    Raises:
        SettingsError: naming the variable to set.
    """
    name = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
    folder = os.environ.get(name, "/tmp")
    excess = len(os.fsencode(f"{folder}{_LONGEST_SOCKET}")) - _MAX_SOCKET_BYTES
    if excess > 0:
        raise SettingsError(
            f"{name} {folder}: it is {excess} bytes too long for the sockets that Ray creates below it; set "
            "RAY_TMPDIR to a shorter folder"
        )


def _join(address: str, *, worker_logs: bool) -> None:
    """Connect to a running cluster."""
    import ray

    _quieten()
    _check_address(address)
    try:
        with _preserve_sigterm():
            ray.init(
                address=address,
                logging_level=logging.ERROR,
                log_to_driver=worker_logs,
                runtime_env=worker_runtime_env(_QUIET_VARIABLES),
            )
    except ConnectionError as error:
        raise ClusterUnreachable(f"{address}: {str(error).splitlines()[0]}") from None


def _quieten() -> None:
    """Keep Ray's own lines, and those of the libraries of its workers, out of the output."""
    import ray.data  # noqa: F401 - its import sets the levels of its loggers, so it comes first

    for name, value in _QUIET_VARIABLES.items():
        os.environ.setdefault(name, value)
    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Discard what is written to stderr: Ray's core announces its log level there. Errors are exceptions."""
    sys.stderr.flush()
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def _check_address(address: str) -> None:
    """Check that a gRPC server answers there: Ray itself tries another address for minutes."""
    if address.startswith(("http://", "https://")):
        raise SettingsError(
            f"RAY_ADDRESS {address}: this is a dashboard, to which `ray job submit` sends jobs; unset it, or "
            "give the cluster's own address, as in HOST:6379"
        )
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return
    import grpc

    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
        if os.environ.get("RAY_USE_TLS") != "1":
            with grpc.insecure_channel(f"{host}:{port}") as channel:
                grpc.channel_ready_future(channel).result(timeout=_CONNECT_SECONDS)
    except (OSError, grpc.FutureTimeoutError) as error:
        reason = getattr(error, "strerror", None) or "what listens there is none"
        raise ClusterUnreachable(
            f"no Ray cluster answers at {address} ({reason}); set RAY_ADDRESS or cluster.address to a "
            "running one, or leave both out for a local cluster"
        ) from None


@contextmanager
def _preserve_sigterm() -> Iterator[None]:
    """Restore the handler of SIGTERM, which Ray replaces in Python and in its core (which prints a stack)."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)
