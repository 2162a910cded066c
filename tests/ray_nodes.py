"""Starts Ray nodes on this machine: a head with a token, and workers that join it and can be killed.

Nothing here calls `ray stop`, which ends every Ray process of the machine.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SCRIPTS = Path(sys.executable).parent
REPOSITORY = Path(__file__).parents[1]


@dataclass(frozen=True, kw_only=True)
class Head:
    """A Ray head.

    Attributes:
        cluster: address that nodes and drivers join.
        dashboard: URL that jobs are submitted to.
        environment: variables with the token.
        folder: of logs and sessions.
    """

    cluster: str
    dashboard: str
    environment: dict[str, str]
    folder: Path

    def job(self, verb: str, *words: str) -> list[str]:
        """The command `ray job <verb>`."""
        return [str(SCRIPTS / "ray"), "job", verb, "--address", self.dashboard, *words]

    def start(
        self, name: str, *words: str, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """Start `ray job submit` of a module of jobs, from the repository's root."""
        options = ["--working-dir", str(REPOSITORY), "--submission-id", name]
        command = self.job("submit", *options, "--", "python", "-m", *words)
        return _started(command, environment or self.environment)

    def submit(self, name: str, *words: str, environment: Mapping[str, str] | None = None) -> tuple[int, str]:
        """Exit code and output of `ray job submit`."""
        process = self.start(name, *words, environment=environment)
        printed, _ = process.communicate(timeout=300)
        return process.returncode, printed

    def drive(self, *words: str) -> subprocess.Popen[str]:
        """Start a driver on the cluster: `python -m` these words."""
        command = [sys.executable, "-m", *words]
        return _started(command, self.environment | {"RAY_ADDRESS": self.cluster})


@contextmanager
def ray_head(folder: Path, *, cpus: int = 4) -> Iterator[Head]:
    """Run a head with its dashboard."""
    token = folder / "token"
    token.write_text("0123456789abcdef" * 2)
    environment = {
        **os.environ,
        "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "PYTHONPATH": "",
        # Ray notices a lost node within seconds instead of half a minute.
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_timeout_ms": "1000",
        "RAY_health_check_failure_threshold": "3",
    }
    names = ("port", "dashboard-port", "dashboard-agent-listen-port", "ray-client-server-port")
    ports = {name: free_port() for name in names}
    words = ["--head", *(f"--{name}={port}" for name, port in ports.items())]
    with _node(words, cpus=cpus, folder=folder, environment=environment) as process:
        await_ready(lambda: _answers(ports["dashboard-port"]), process)
        yield Head(
            cluster=f"127.0.0.1:{ports['port']}",
            dashboard=f"http://127.0.0.1:{ports['dashboard-port']}",
            environment=environment,
            folder=folder,
        )


@contextmanager
def ray_worker(head: Head, name: str, *, cpus: int) -> Iterator[subprocess.Popen[bytes]]:
    """Run a node of a head's cluster; `kill_node` kills it.

    Two nodes that start at the same moment on one machine choose the same sockets, and one of them fails.
    """
    folder = head.folder / name
    folder.mkdir()
    words = [f"--address={head.cluster}", f"--dashboard-agent-listen-port={free_port()}"]
    with _node(words, cpus=cpus, folder=folder, environment=head.environment) as process:
        await_ready(lambda: "Ray runtime started" in (folder / "log").read_text(), process)
        yield process


def kill_node(node: subprocess.Popen[bytes]) -> None:
    """Send SIGKILL to all processes of a node at once, like a preempted spot instance."""
    for process in [node.pid, *descendants(node.pid)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    node.wait()


@contextmanager
def _node(
    words: list[str], *, cpus: int, folder: Path, environment: Mapping[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    command = [str(SCRIPTS / "ray"), "start", "--block", f"--num-cpus={cpus}", *words]
    command += [f"--temp-dir={folder}/ray"] if "--head" in words else []
    # A tenth of the machine's memory for objects, where Ray would take a third for every node.
    command += [f"--object-store-memory={256 << 20}"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            kill_node(process)


def _started(command: list[str], environment: Mapping[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def await_ready(ready: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Wait until a node that was started is ready.

    Raises:
        TimeoutError: if its process has ended, or takes too long.
    """
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        if ready():
            return
        time.sleep(0.2)
    raise TimeoutError("the node did not start")


def _answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
    except OSError:
        return False


def processes(mark: str = "") -> Iterator[tuple[int, list[str]]]:
    """Processes of this machine with their command lines; of those alone with `mark` in their environment."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile, or is another user's
            if mark.encode() in (folder / "environ").read_bytes():
                yield int(folder.name), (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")


def descendants(root: int) -> list[int]:
    """The processes that come from one, without it."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    found = [root]
    for parent in found:
        found += [child for child, its in parents.items() if its == parent]
    return found[1:]
