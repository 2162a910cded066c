"""An encoder and a trainer that work at once, in processes that are killed at random moments.

SNAPFUSION_KILLS bounds the kills.
"""

import multiprocessing
import os
import random
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from conftest import ray_train_locally, tiny_bundle
from in_process import in_process
from student_inputs import VPRED, encode

from jobs.training.settings import ValidationSettings
from jobs.training.velocity import finetune_vpred
from pipelines.datasets.latents import encode_latents
from pipelines.datasets.settings import LatentsSettings
from pipelines.sources.webdataset import list_shards
from pipelines.stages.settings import ImageSettings
from pipelines.tables.settings import Bounds
from snapfusion.models.save import save

ENCODING = LatentsSettings(
    rows_per_unit=2, images=ImageSettings(min_side=8), bounds=Bounds(commit_seconds=0.0)
)
TRAINING = VPRED.model_copy(update={"validation": ValidationSettings(), "follow": True}).with_values(
    ["loop.num_steps=24", "loader.window_units=2", "trainer.heartbeat_seconds=0.5"]
)


def run_encoder(inputs: Path, out: Path) -> None:
    encode_latents(
        ENCODING,
        model=str(inputs / "tiny"),
        shards=list_shards(str(inputs / "shards")),
        source="web",
        url=str(out / "latents"),
        run=in_process,
    )


def run_trainer(inputs: Path, out: Path) -> None:
    with ray_train_locally():
        finetune_vpred(
            TRAINING,
            model=str(inputs / "tiny"),
            latents_url=str(out / "latents"),
            out_url=str(out / "vpred"),
            table_sources=lambda: [f"web/{shard.name}" for shard in list_shards(str(inputs / "shards"))],
        )


def started(work: Callable[[Path, Path], None], *folders: Path) -> BaseProcess:
    context = multiprocessing.get_context("forkserver")
    # Imported once: processes begin at once, and are killed at work.
    context.set_forkserver_preload([__name__])
    process = context.Process(target=work, args=folders)
    process.start()
    return process


def files_of(out: Path) -> dict[str, bytes]:
    """The data files of the table, and the weights."""
    paths = [*(out / "latents").glob("*.parquet"), *(out / "vpred").rglob("*.safetensors")]
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in paths}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_encoder_and_trainer_end_with_equal_weights(tmp_path, capsys):
    save(tiny_bundle(), tmp_path / "tiny")
    encode(tmp_path, model=str(tmp_path / "tiny"), side=16, rows=48, wide=1)
    began = time.monotonic()
    for work in (run_encoder, run_trainer):
        alone = started(work, tmp_path, tmp_path / "alone")
        alone.join()
        assert alone.exitcode == 0
    duration, expected = time.monotonic() - began, files_of(tmp_path / "alone")
    assert len(expected) > 24
    draws, killed, ends = random.Random(0), 0, 0
    kills = int(os.environ.get("SNAPFUSION_KILLS", "10"))
    while killed < kills:
        out, running = tmp_path / f"run-{ends}", {}
        while True:
            for work in (run_encoder, run_trainer):
                if work not in running:
                    running[work] = started(work, tmp_path, out)
            limit = time.monotonic() + (draws.uniform(0, duration) if killed < kills else 600)
            while time.monotonic() < limit and any(one.is_alive() for one in running.values()):
                time.sleep(0.02)
            if all(one.exitcode == 0 for one in running.values()):
                break
            assert killed < kills, "neither ends"
            for work in draws.choice([[run_encoder], [run_trainer], [run_encoder, run_trainer]]):
                running[work].kill()
                running.pop(work).join()
            killed += 1
        ends += 1
        assert files_of(out) == expected
    with capsys.disabled():
        print(f"\n{killed} kills in {ends} runs of {duration:.0f} s undisturbed, equal files")
