"""More than one node: a worker node is taken away in the middle, and the job ends as if it had not been."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from in_process import in_process
from ray_nodes import Head, kill_node, ray_head, ray_worker
from safetensors.torch import load_file

from jobs import render_scenes
from jobs.cli import Job
from jobs.recipes import recipe_named
from pipelines.latents import encode_latents
from pipelines.pairs import captions_of, generate_pairs
from pipelines.sources.webdataset import list_shards
from pipelines.tables import accounts, is_table, open_table


@pytest.fixture(scope="module")
def head(tmp_path_factory) -> Iterator[Head]:
    """A head that carries drivers and no work."""
    with ray_head(tmp_path_factory.mktemp("head"), cpus=0) as head:
        yield head


@pytest.fixture
def nodes(head: Head) -> Iterator[list[subprocess.Popen[bytes]]]:
    with ExitStack() as stack:
        yield [stack.enter_context(ray_worker(head, f"node-{number}", cpus=2)) for number in range(2)]


SCENES = ("source.scenes=96", "source.scenes_per_shard=48")
PAIRS = (*SCENES, "pairs.rows_per_unit=8", "pairs.bounds.commit_seconds=0")


def settings(assignments: tuple[str, ...]) -> list[str]:
    return [word for assignment in assignments for word in ("--set", assignment)]


def units_in(url: str) -> int:
    return len(open_table(url).units) if is_table(url) else 0


@pytest.fixture(scope="module")
def run(head: Head, tmp_path_factory) -> Path:
    """A run with LATENTS."""
    out = tmp_path_factory.mktemp("run")
    recipe = recipe_named("mini").with_values(list(SCENES))
    job = Job(verb="render_scenes", recipe=recipe, out=str(out))
    render_scenes.render_scenes(job)
    encode_latents(
        recipe.latents,
        model="mini",
        shards=list_shards(f"{out}/shards"),
        source="scenes",
        url=f"{out}/latents",
        run=in_process,
    )
    return out


def data_files(table: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(table).glob("*.parquet")}


@pytest.mark.slow
@pytest.mark.ray
def test_generation_goes_on_when_a_node_is_taken_away(head: Head, nodes, run: Path, capsys):
    driver = head.drive("jobs.generate_pairs", "--out", str(run), *settings(PAIRS))
    deadline = time.monotonic() + 240
    while units_in(f"{run}/pairs") < 2:
        assert driver.poll() is None, driver.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    killed, before = time.monotonic(), units_in(f"{run}/pairs")
    kill_node(nodes[1])
    while units_in(f"{run}/pairs") == before and driver.poll() is None:
        time.sleep(0.1)
    paused = time.monotonic() - killed
    printed, _ = driver.communicate(timeout=240)
    with capsys.disabled():
        print(f"\nthe next unit after a node's death came after {paused:.1f} s; {before} of 12 stood")
    assert driver.returncode == 0, printed
    assert before < 12
    recipe = recipe_named("mini").with_values(list(PAIRS))
    alone = generate_pairs(
        recipe.pairs,
        teacher="mini",
        captions=[*captions_of(open_table(f"{run}/latents"))],
        source=recipe.captions.name,
        url=f"{run}/alone",
        run=in_process,
    )
    assert data_files(f"{run}/pairs") == data_files(alone.url)
    assert sum(account.rows_read for account in accounts(f"{run}/pairs").values()) == 96


VPRED = (
    "vpred.loop.num_steps=240",
    "vpred.loop.global_batch=32",
    "vpred.trainer.num_workers=2",
    "vpred.trainer.micro_batch=16",
    "vpred.trainer.checkpoint_every=20",
)


def train(head: Head, run: Path, *more: str) -> subprocess.Popen[str]:
    return head.drive("jobs.finetune_vpred", "--out", str(run), *settings((*SCENES, *VPRED, *more)))


def await_checkpoint(run: Path, *, beyond: int, driver: subprocess.Popen[str]) -> int:
    """The first step after `beyond` of which there is a whole checkpoint."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        assert driver.poll() is None, driver.communicate()[0]
        manifests = (run / "vpred.training").glob("*/step-*/manifest.json")
        steps = [int(manifest.parent.name.rpartition("-")[2]) for manifest in manifests]
        if steps and max(steps) > beyond:
            return max(steps)
        time.sleep(0.1)
    raise TimeoutError(f"no checkpoint beyond step {beyond}")


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "vpred" / "unet" / "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def undisturbed(head: Head, run: Path, tmp_path_factory) -> Path:
    """A training that nothing happened to, on two nodes."""
    alone = tmp_path_factory.mktemp("alone") / "run"
    shutil.copytree(run, alone)
    with ray_worker(head, "a", cpus=2), ray_worker(head, "b", cpus=2):
        driver = train(head, alone)
        printed, _ = driver.communicate(timeout=400)
        assert driver.returncode == 0, printed
    return alone


@pytest.mark.slow
@pytest.mark.ray
def test_training_whose_node_is_taken_away_ends_with_the_same_weights(
    head: Head, nodes, run: Path, undisturbed: Path, tmp_path: Path, capsys
):
    shutil.copytree(run, tmp_path / "run")
    driver = train(head, tmp_path / "run", "vpred.trainer.cpus_per_worker=1")
    saved = await_checkpoint(tmp_path / "run", beyond=0, driver=driver)
    kill_node(nodes[0])
    killed = time.monotonic()
    await_checkpoint(tmp_path / "run", beyond=saved + 20, driver=driver)
    paused = time.monotonic() - killed
    printed, _ = driver.communicate(timeout=400)
    with capsys.disabled():
        print(f"\nkilled after step {saved}; two checkpoints further {paused:.1f} s later")
    assert driver.returncode == 0, printed
    found, wanted = weights_of(tmp_path / "run"), weights_of(undisturbed)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.slow
@pytest.mark.ray
def test_elastic_training_goes_on_with_fewer_workers_and_comes_back(
    head: Head, nodes, run: Path, undisturbed: Path, tmp_path: Path
):
    shutil.copytree(run, tmp_path / "run")
    elastic = (
        "vpred.trainer.min_workers=1",
        "vpred.trainer.cpus_per_worker=2",
        "vpred.trainer.resize_seconds=5",
    )
    driver = train(head, tmp_path / "run", *elastic, "vpred.loop.num_steps=600")
    saved = await_checkpoint(tmp_path / "run", beyond=0, driver=driver)
    kill_node(nodes[0])
    saved = await_checkpoint(tmp_path / "run", beyond=saved + 20, driver=driver)
    with ray_worker(head, "again", cpus=2):
        printed, _ = driver.communicate(timeout=500)
    assert driver.returncode == 0, printed
    said = re.findall(r"steps/s by (\d) worker", printed)
    assert [workers for workers, _ in itertools.groupby(said)] == ["2", "1", "2"], printed
