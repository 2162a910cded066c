"""The kill matrix: who is killed, when and how often; what is left is what an undisturbed run leaves.

A head without CPUs carries the drivers, two nodes the work; a node that is taken away is replaced, as a cloud
does. Part of `make bench`, which prints how much longer each run took than one that nothing happened to.
"""

from __future__ import annotations

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
from in_process import in_process
from ray_nodes import Head, kill_node, ray_head, ray_worker

from jobs import render_scenes
from jobs.cli.job import Job
from jobs.recipes.registry import recipe_named
from pipelines.datasets.latents import encode_latents
from pipelines.datasets.pairs import captions_of, generate_pairs
from pipelines.sources.webdataset import list_shards
from pipelines.tables.table import is_table, open_table

pytestmark = [pytest.mark.slow, pytest.mark.ray]

SCENES = ("source.scenes=96", "source.scenes_per_shard=48")
PAIRS = (*SCENES, "pairs.rows_per_unit=8", "pairs.bounds.commit_seconds=0.5")
VPRED = (
    *SCENES,
    "vpred.loop.num_steps=160",
    "vpred.loop.global_batch=32",
    "vpred.trainer.num_workers=2",
    "vpred.trainer.micro_batch=16",
    "vpred.trainer.checkpoint_every=20",
    "vpred.trainer.max_failures=5",
)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """A head that carries drivers and no work."""
    with ray_head(tmp_path_factory.mktemp("head"), cpus=0) as head:
        yield head


@dataclass
class Nodes:
    """Two nodes that do the work."""

    head: Head
    stack: ExitStack
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)
    begun: int = 0

    def add(self) -> None:
        self.begun += 1
        self.running.append(self.stack.enter_context(ray_worker(self.head, f"node-{self.begun}", cpus=2)))

    def take_away(self) -> None:
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
    recipe = recipe_named("mini").with_values(list(SCENES))
    render_scenes.render_scenes(Job(verb="render_scenes", recipe=recipe, out=str(out)))
    encode_latents(
        recipe.latents,
        model="mini",
        shards=list_shards(f"{out}/shards"),
        source="scenes",
        url=f"{out}/latents",
        run=in_process,
    )
    return out


@dataclass
class Driver:
    """A job's driver beside the head, started again when it was killed."""

    head: Head
    command: tuple[str, ...]
    printed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.began = time.monotonic()
        self.start()

    def start(self) -> None:
        self.process = self.head.drive(*self.command)
        # Read all the time: a driver whose line is full would stand still.
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

    def until(self, happened: Callable[[], bool]) -> None:
        """Wait for something, as long as the driver is there."""
        deadline = time.monotonic() + 240
        while not happened():
            assert self.process.poll() is None, "".join(self.printed)
            assert time.monotonic() < deadline, "".join(self.printed)
            time.sleep(0.01)

    def end(self) -> float:
        """Seconds since the first start, when it has ended well."""
        try:
            code = self.process.wait(timeout=400)
        finally:
            self.process.kill()
        self.reader.join()
        assert code == 0, "".join(self.printed)
        return time.monotonic() - self.began


def settings(assignments: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(word for assignment in assignments for word in ("--set", assignment))


def workers(title: str) -> list[int]:
    """Processes of Ray that have such an actor in them."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "cmdline").read_bytes().decode(errors="replace").startswith(title):
                found.append(int(folder.name))
        except OSError:  # it ended meanwhile
            continue
    return sorted(found)


def strike(who: str, *, driver: Driver, nodes: Nodes, actors: str) -> None:
    """SIGKILL for the driver, one worker, or all of a node."""
    if who == "driver":
        driver.kill()
    elif who == "node":
        nodes.take_away()
        nodes.add()
    else:
        os.kill(workers(actors)[0], signal.SIGKILL)


def units_in(url: Path) -> int:
    return len(open_table(str(url)).units) if is_table(str(url)) else 0


def uncommitted(url: Path) -> bool:
    """Whether there is a data file that no commit names."""
    return is_table(str(url)) and len([*url.glob("*.parquet")]) > units_in(url)


def data_files(table: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in table.glob("*.parquet")}


@pytest.fixture(scope="module")
def drawn(run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The data files of PAIRS, made in one process."""
    recipe = recipe_named("mini").with_values(list(PAIRS))
    out = tmp_path_factory.mktemp("alone") / "pairs"
    generate_pairs(
        recipe.pairs,
        teacher="mini",
        captions=[*captions_of(open_table(f"{run}/latents"))],
        source=recipe.captions.name,
        url=str(out),
        run=in_process,
    )
    return data_files(out)


TEACHERS = "ray::MapWorker"
TRAINERS = "ray::RayTrainWorker"


@pytest.fixture(scope="module")
def quiet_pairs(head: Head, nodes: Nodes, run: Path, tmp_path_factory: pytest.TempPathFactory) -> float:
    """Seconds of a generation that nothing happens to."""
    out = tmp_path_factory.mktemp("quiet") / "run"
    shutil.copytree(run, out)
    return Driver(head, ("jobs.generate_pairs", "--out", str(out), *settings(PAIRS))).end()


def said(capsys: pytest.CaptureFixture[str], line: str) -> None:
    with capsys.disabled():
        print(f"\n{line}", flush=True)


@pytest.mark.parametrize(
    ("who", "when", "times"),
    [
        *itertools.product(("worker", "node", "driver"), ("before the first unit", "file to commit"), (1,)),
        *itertools.product(("worker", "node", "driver"), ("between units",), (3,)),
    ],
)
def test_generation(
    who: str,
    when: str,
    times: int,
    head: Head,
    nodes: Nodes,
    run: Path,
    drawn: dict[str, bytes],
    quiet_pairs: float,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    shutil.copytree(run, out)
    pairs, driver = out / "pairs", Driver(head, ("jobs.generate_pairs", "--out", str(out), *settings(PAIRS)))
    for struck in range(times):
        if when == "before the first unit":
            driver.until(lambda: bool(workers(TEACHERS)))
        elif when == "between units":
            driver.until(lambda struck=struck: units_in(pairs) > 2 * struck and bool(workers(TEACHERS)))
        else:
            driver.until(lambda: uncommitted(pairs))
        strike(who, driver=driver, nodes=nodes, actors=TEACHERS)
    lost = driver.end() - quiet_pairs
    said(capsys, f"generation | {who} | {when} | {times} | {lost:.1f} s of {quiet_pairs:.1f} s")
    assert data_files(pairs) == drawn
    assert sum(account.rows_read for account in open_table(str(pairs)).manifests().values()) == 96


def checkpoints(out: Path, *, whole: bool = True) -> list[int]:
    """Steps of which there is a checkpoint; or a folder of one that is being written."""
    folders = [*(out / "vpred.training").glob("*/step-*")]
    return [
        int(folder.name.rpartition("-")[2])
        for folder in folders
        if (folder / "manifest.json").exists() == whole
    ]


def weights(out: Path) -> bytes:
    return (out / "vpred" / "model" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def quiet_training(
    head: Head, nodes: Nodes, run: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[bytes, float]:
    """The weights and the seconds of a training that nothing happens to."""
    out = tmp_path_factory.mktemp("quiet") / "run"
    shutil.copytree(run, out)
    seconds = Driver(head, ("jobs.finetune_vpred", "--out", str(out), *settings(VPRED))).end()
    return weights(out), seconds


@pytest.mark.parametrize(
    ("who", "when", "times"),
    [
        *itertools.product(("worker", "node", "driver"), ("checkpoint being written",), (1,)),
        *itertools.product(("worker", "node", "driver"), ("between checkpoints",), (2,)),
    ],
)
def test_training(
    who: str,
    when: str,
    times: int,
    head: Head,
    nodes: Nodes,
    run: Path,
    quiet_training: tuple[bytes, float],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    shutil.copytree(run, out)
    driver = Driver(head, ("jobs.finetune_vpred", "--out", str(out), *settings(VPRED)))
    for struck in range(times):
        if when == "between checkpoints":
            beyond = 20 + 60 * struck
            driver.until(lambda beyond=beyond: max(checkpoints(out), default=0) >= beyond)
        else:
            driver.until(lambda: bool(checkpoints(out, whole=False)))
        strike(who, driver=driver, nodes=nodes, actors=TRAINERS)
    wanted, quiet = quiet_training
    lost = driver.end() - quiet
    said(capsys, f"training | {who} | {when} | {times} | {lost:.1f} s of {quiet:.1f} s")
    assert weights(out) == wanted


def test_elastic_training_goes_on_with_fewer_workers_and_comes_back(
    head: Head, nodes: Nodes, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(run, out)
    elastic = (
        "vpred.trainer.min_workers=1",
        "vpred.trainer.cpus_per_worker=2",
        "vpred.trainer.resize_seconds=5",
        "vpred.loop.num_steps=600",
    )
    driver = Driver(head, ("jobs.finetune_vpred", "--out", str(out), *settings((*VPRED, *elastic))))
    driver.until(lambda: max(checkpoints(out), default=0) >= 40)
    nodes.take_away()
    struck, stood = time.monotonic(), max(checkpoints(out))
    driver.until(lambda: max(checkpoints(out)) > stood)
    paused = time.monotonic() - struck
    nodes.add()
    driver.end()
    said(capsys, f"elastic training | node | {paused:.1f} s to the next checkpoint, by one worker")
    by = re.findall(r"steps/s by (\d) worker", "".join(driver.printed))
    assert [count for count, _ in itertools.groupby(by)] == ["2", "1", "2"], "".join(driver.printed)
