"""More than one node: a worker node is taken away in the middle, and the job ends as if it had not been."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from in_process import in_process
from ray_nodes import Head, kill_node, ray_head, ray_worker

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
