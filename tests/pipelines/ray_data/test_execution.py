"""Stages on a Ray cluster: the same bytes, and no death of a process loses or doubles a row."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from in_process import in_process
from latent_inputs import SETTINGS as LATENTS
from latent_inputs import data_files, encode, make_shards, noise_image
from pair_inputs import CAPTIONS
from pair_inputs import SETTINGS as PAIRS
from poison import CrashingStage, PoisonedReader, poison_of, set_aside
from synthetic_units import IDENTITY, SCHEMA

from pipelines.datasets.pairs import generate_pairs
from pipelines.ray_data.execution import PipelineStage, run_on_ray
from pipelines.ray_data.settings import Pool
from pipelines.stages.write import WriteUnit
from pipelines.tables.committer import commit_stream
from pipelines.tables.settings import Bounds
from pipelines.tables.table import create_table, open_table
from snapfusion.settings import digest

pytestmark = pytest.mark.ray


def generate(url: Path, teacher: str, *, run: Any):
    return generate_pairs(PAIRS, teacher=teacher, captions=CAPTIONS, source="list", url=str(url), run=run)


def with_first(build: Any, **more: Any) -> Any:
    """`run_on_ray` with another first stage."""

    def run(items: Iterable[Any], stages: list[PipelineStage]) -> Iterator[Any]:
        first = replace(stages[0], build=build, arguments={**stages[0].arguments, **more})
        return run_on_ray(items, [first, *stages[1:]])

    return run


class WaitForAnother:
    """Returns an item once two processes have begun one, or after two minutes."""

    def __init__(self, *, marks: str) -> None:
        self.marks = Path(marks)

    def __call__(self, item: int) -> tuple[int, int]:
        (self.marks / str(os.getpid())).touch()
        deadline = time.monotonic() + 120
        while len([*self.marks.iterdir()]) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        return item, os.getpid()


def test_pool_grows_while_all_its_actors_work(ray_cluster, tmp_path):
    pool = Pool(actors=1, max_actors=2, cpus=0.5)
    stages = [PipelineStage(build=WaitForAnother, arguments={"marks": str(tmp_path)}, pool=pool)]
    items, workers = zip(*run_on_ray(range(8), stages), strict=True)
    assert sorted(items) == list(range(8))
    assert len(set(workers)) == 2


# In CI test_targets does so with TARGETS, of which a teacher dies.
@pytest.mark.slow
def test_ray_writes_the_bytes_of_one_process(ray_cluster, tiny_teacher, tmp_path):
    alone = generate(tmp_path / "alone", tiny_teacher, run=in_process)
    by_ray = generate(tmp_path / "ray", tiny_teacher, run=run_on_ray)
    assert data_files(Path(by_ray.url)) == data_files(Path(alone.url))


def test_row_that_kills_its_worker_is_rejected(ray_cluster, tiny_teacher, tmp_path):
    make_shards(tmp_path / "shards", shards=1)
    run = with_first(PoisonedReader, poison=poison_of(noise_image(5)))
    table = encode(tmp_path / "latents", tmp_path / "shards", tiny_teacher, settings=LATENTS, run=run)
    reasons = {row["id"]: row["reason"] for row in table.rejected_rows()}
    assert reasons == {"web/00000/0000003": "not_an_image", "web/00000/0000005": "crashed"}
    assert table.num_rows == 8


@pytest.mark.slow
def test_unit_that_kills_three_workers_is_rejected(ray_cluster, tmp_path):
    url, marks = str(tmp_path / "latents"), tmp_path / "marks"
    table = create_table(url, schema=SCHEMA, identity=IDENTITY)
    writer = {"url": table.url, "schema": SCHEMA, "settings": digest(table.identity)}
    stages = [
        PipelineStage(build=CrashingStage, arguments={"marks": str(marks)}, pool=Pool(), give_up=set_aside),
        PipelineStage(build=WriteUnit, arguments=writer, pool=Pool()),
    ]
    commit_stream(table, run_on_ray([0, 4, 8], stages), bounds=Bounds(), total=12)
    by_unit = {manifest.start: manifest.rejected() for manifest in open_table(url).manifests().values()}
    assert by_unit == {0: {"broken_image": 1}, 4: {"crashed": 4}, 8: {"broken_image": 1}}
    assert marks.read_text() == "xxx"


# In CI test_targets kills a driver, without Ray.
@pytest.mark.slow
def test_killed_driver_continues_to_the_same_bytes(tiny_teacher, tmp_path):
    alone = generate(tmp_path / "alone", tiny_teacher, run=in_process)
    url = tmp_path / "killed"
    script = Path(__file__).with_name("generate_slowly.py")
    driver = subprocess.Popen([sys.executable, str(script), tiny_teacher, str(url)])
    deadline = time.monotonic() + 240
    while not list(url.glob("*.parquet")) and driver.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(driver.pid, signal.SIGKILL)
    assert driver.wait() == -signal.SIGKILL
    assert len(open_table(str(url)).units) < 3
    again = generate(url, tiny_teacher, run=in_process)
    assert data_files(url) == data_files(Path(alone.url))
    assert again.num_rows == len(CAPTIONS)
