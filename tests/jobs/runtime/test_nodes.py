"""Kills a worker, a node or the driver at each point of a run, and compares with an undisturbed run.

A head without CPUs runs the drivers, two nodes the work; a killed node is replaced, as a cloud does. Part of
`make bench`, which prints how much longer each run took than an undisturbed one.
"""

import itertools
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from ray_nodes import Head, kill_node, processes, ray_head, ray_worker
from scene_latents import data_files, encode_scenes, pairs_of
from set_options import set_options

from pipelines.tables.table import is_table, open_table

pytestmark = [pytest.mark.slow, pytest.mark.ray]

PAIRS = ("pairs.rows_per_unit=8", "pairs.bounds.commit_seconds=0.5")
VPRED = (
    *("vpred.loop.num_steps=160", "vpred.loop.global_batch=32", "vpred.trainer.num_workers=2"),
    *("vpred.trainer.micro_batch=16", "vpred.trainer.checkpoint_every=20", "vpred.trainer.max_failures=5"),
)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """A head that runs drivers alone."""
    with ray_head(tmp_path_factory.mktemp("head"), cpus=0) as head:
        yield head


@dataclass
class Nodes:
    """Two nodes that run the work."""

    head: Head
    stack: ExitStack
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)
    started: int = 0

    def add(self) -> None:
        self.started += 1
        self.running.append(self.stack.enter_context(ray_worker(self.head, f"node-{self.started}", cpus=2)))

    def kill_oldest(self) -> None:
        kill_node(self.running.pop(0))


@pytest.fixture(scope="module")
def nodes(head: Head) -> Iterator[Nodes]:
    with ExitStack() as stack:
        nodes = Nodes(head, stack)
        nodes.add()
        nodes.add()
        yield nodes


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with LATENTS."""
    out = tmp_path_factory.mktemp("run")
    encode_scenes(out, count=96)
    return out


@dataclass
class Driver:
    """A job's driver on the head, restarted when it is killed."""

    head: Head
    command: tuple[str, ...]
    printed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.began = time.monotonic()
        self.start()

    def start(self) -> None:
        self.process = self.head.drive(*self.command)
        # Read continuously: a driver blocks when its pipe is full.
        self.reader = threading.Thread(target=self._read, args=(self.process,), daemon=True)
        self.reader.start()

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout as lines:
            self.printed.extend(lines)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.start()

    def wait_until(self, happened: Callable[[], bool]) -> None:
        """Wait for a condition while the driver runs."""
        deadline = time.monotonic() + 240
        while not happened():
            assert self.process.poll() is None, "".join(self.printed)
            assert time.monotonic() < deadline, "".join(self.printed)
            time.sleep(0.01)

    def end(self) -> float:
        """Seconds from the first start to a successful end."""
        try:
            code = self.process.wait(timeout=400)
        finally:
            self.process.kill()
        self.reader.join()
        assert code == 0, "".join(self.printed)
        return time.monotonic() - self.began


def workers(title: str) -> list[int]:
    """Ray processes of an actor class."""
    return sorted(pid for pid, words in processes() if words[0].startswith(title))


def strike(who: str, *, driver: Driver, nodes: Nodes, actors: str) -> None:
    """Send SIGKILL to the driver, one worker, or a whole node."""
    if who == "driver":
        driver.kill()
    elif who == "node":
        nodes.kill_oldest()
        nodes.add()
    else:
        os.kill(workers(actors)[0], signal.SIGKILL)


def units_in(url: Path) -> int:
    return len(open_table(str(url)).units) if is_table(str(url)) else 0


def has_uncommitted_file(url: Path) -> bool:
    return is_table(str(url)) and len([*url.glob("*.parquet")]) > units_in(url)


def generate(head: Head, out: Path) -> Driver:
    return Driver(head, ("jobs.generate_pairs", "--out", str(out), *set_options(PAIRS)))


def finetune(head: Head, out: Path, *more: str) -> Driver:
    return Driver(head, ("jobs.finetune_vpred", "--out", str(out), *set_options((*VPRED, *more))))


@pytest.fixture
def out(run, tmp_path) -> Path:
    """A copy of the run, to be written into."""
    return Path(shutil.copytree(run, tmp_path / "run"))


@pytest.fixture(scope="module")
def expected_pairs(run, tmp_path_factory) -> dict[str, bytes]:
    """Data files of PAIRS generated in one process."""
    return pairs_of(run / "latents", tmp_path_factory.mktemp("alone") / "pairs", PAIRS)


TEACHERS = "ray::MapWorker"
TRAINERS = "ray::RayTrainWorker"
VICTIMS = ("worker", "node", "driver")


@pytest.fixture(scope="module")
def quiet_pairs(head, nodes, run, tmp_path_factory) -> float:
    """Seconds of an undisturbed generation."""
    return generate(head, shutil.copytree(run, tmp_path_factory.mktemp("quiet") / "run")).end()


def show(capsys, line: str) -> None:
    with capsys.disabled():
        print(f"\n{line}", flush=True)


@pytest.mark.parametrize(
    ("who", "when", "times"),
    [
        *itertools.product(VICTIMS, ("before the first unit", "file to commit"), (1,)),
        *itertools.product(VICTIMS, ("between units",), (3,)),
    ],
)
def test_generation(who, when, times, head, nodes, out, expected_pairs, quiet_pairs, capsys):
    pairs, driver = out / "pairs", generate(head, out)
    for struck in range(times):
        if when == "before the first unit":
            driver.wait_until(lambda: bool(workers(TEACHERS)))
        elif when == "between units":
            driver.wait_until(lambda struck=struck: units_in(pairs) > 2 * struck and bool(workers(TEACHERS)))
        else:
            driver.wait_until(lambda: has_uncommitted_file(pairs))
        strike(who, driver=driver, nodes=nodes, actors=TEACHERS)
    lost = driver.end() - quiet_pairs
    show(capsys, f"generation | {who} | {when} | {times} | {lost:.1f} s of {quiet_pairs:.1f} s")
    assert data_files(pairs) == expected_pairs
    assert sum(manifest.rows_read for manifest in open_table(str(pairs)).manifests().values()) == 96


def checkpoints(out: Path, *, complete: bool = True) -> list[int]:
    """Steps of complete checkpoints, or of those being written."""
    return [
        int(folder.name.rpartition("-")[2])
        for folder in (out / "vpred.training").glob("*/step-*")
        if (folder / "manifest.json").exists() == complete
    ]


def weights(out: Path) -> bytes:
    return (out / "vpred" / "model" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def quiet_training(head, nodes, run, tmp_path_factory) -> tuple[bytes, float]:
    """Weights and seconds of an undisturbed training."""
    out = shutil.copytree(run, tmp_path_factory.mktemp("quiet") / "run")
    seconds = finetune(head, out).end()
    return weights(out), seconds


@pytest.mark.parametrize(
    ("who", "when", "times"),
    [
        *itertools.product(VICTIMS, ("checkpoint being written",), (1,)),
        *itertools.product(VICTIMS, ("between checkpoints",), (2,)),
    ],
)
def test_training(who, when, times, head, nodes, out, quiet_training, capsys):
    driver = finetune(head, out)
    for struck in range(times):
        if when == "between checkpoints":
            beyond = 20 + 60 * struck
            driver.wait_until(lambda beyond=beyond: max(checkpoints(out), default=0) >= beyond)
        else:
            driver.wait_until(lambda: bool(checkpoints(out, complete=False)))
        strike(who, driver=driver, nodes=nodes, actors=TRAINERS)
    expected, quiet = quiet_training
    lost = driver.end() - quiet
    show(capsys, f"training | {who} | {when} | {times} | {lost:.1f} s of {quiet:.1f} s")
    assert weights(out) == expected


def test_elastic_training_shrinks_and_grows_again(head, nodes, out, capsys):
    elastic = ("trainer.min_workers=1", "trainer.cpus_per_worker=2", "trainer.resize_seconds=5")
    driver = finetune(head, out, *(f"vpred.{one}" for one in (*elastic, "loop.num_steps=600")))
    driver.wait_until(lambda: max(checkpoints(out), default=0) >= 40)
    nodes.kill_oldest()
    killed, step = time.monotonic(), max(checkpoints(out))
    driver.wait_until(lambda: max(checkpoints(out)) > step)
    paused = time.monotonic() - killed
    nodes.add()
    driver.end()
    show(capsys, f"elastic training | node | {paused:.1f} s to the next checkpoint, by one worker")
    by = re.findall(r"steps/s by (\d) worker", "".join(driver.printed))
    assert [count for count, _ in itertools.groupby(by)] == ["2", "1", "2"], "".join(driver.printed)
