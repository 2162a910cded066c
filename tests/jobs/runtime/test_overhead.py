"""Measures what Ray and our own code add to a teacher of a fixed time; part of `make bench`.

The teacher sleeps, so two cores run four workers, and the test measures scheduling, reading, writing and the
exchange of gradients instead of a network.
"""

import contextlib
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray_nodes import descendants
from scene_latents import encode_scenes
from set_options import set_options
from sleeping import SECONDS_A_ROW, SHARE, SleepingObjective, SleepingTeacher, student, trainings

from jobs.training.progress_channel import seconds_per_step
from jobs.training.settings import TrainerSettings
from jobs.training.trainer import run_trainings
from pipelines.datasets.pairs import generate_pairs
from pipelines.datasets.settings import PairsSettings
from pipelines.loading.rows import to_batch
from pipelines.ray_data.execution import PipelineStage, run_on_ray
from pipelines.ray_data.settings import Pool
from pipelines.sources.captions import Caption
from pipelines.stages.settings import Device, Generation
from pipelines.tables.table import open_table
from pipelines.tables.units import CaptionRows, Unit

pytestmark = [pytest.mark.slow, pytest.mark.ray]

WORKERS = (1, 2, 4)
ROWS = 16
"""Rows of a unit: the simulated teacher takes 0.4 s for them."""


def shown(title: str, *, rows: int, bare: float, capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """A function that prints a line at once; the first line says what is measured."""

    def show(line: str) -> None:
        with capsys.disabled():
            print(line, flush=True)

    show(f"\n{title}: the teacher sleeps {SECONDS_A_ROW * rows:.3f} s, {bare=:.3f} s")
    return show


def pairs_settings(workers: int) -> PairsSettings:
    return PairsSettings(
        generation=Generation(steps=1, guidance=1.0, batch_size=ROWS),
        rows_per_unit=ROWS,
        device=Device(threads=1),
        teachers=Pool(actors=workers, cpus=0.25),
        writers=Pool(actors=1, cpus=0.25),
    )


def asleep(items: Iterable[Any], stages: list[PipelineStage]) -> Iterator[Any]:
    """`run_on_ray` with a sleeping teacher."""
    yield from run_on_ray(items, [replace(stages[0], build=SleepingTeacher), *stages[1:]])


def captions(count: int) -> list[Caption]:
    return [Caption(id=f"{n:06d}", ordinal=n, text="a red circle") for n in range(count)]


def bare_unit_seconds() -> float:
    """Seconds of a unit by the sleeping teacher alone, in a loop."""
    settings = pairs_settings(1)
    teacher = SleepingTeacher(teacher="mini", settings=settings.generation, device=settings.device)
    unit = Unit(name="u", source="s", start=0, stop=ROWS, final=True, source_digest="")
    rows = CaptionRows(unit=unit, draw=0, captions=captions(ROWS), rejections=[])
    teacher(rows)
    began = time.monotonic()
    for _ in range(10):
        teacher(rows)
    return (time.monotonic() - began) / 10


def test_generation(ray_cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare, ratios = bare_unit_seconds(), []
    show = shown(f"generation, a unit of {ROWS} rows", rows=ROWS, bare=bare, capsys=capsys)
    for workers in WORKERS:
        arrived, url = [time.monotonic()], str(tmp_path / f"pairs-{workers}")
        generate_pairs(
            pairs_settings(workers),
            teacher="mini",
            captions=captions(60 * workers * ROWS),
            source="list",
            url=url,
            run=asleep,
            on_progress=lambda _, arrived=arrived: arrived.append(time.monotonic()),
        )
        woke = sorted(account.environment["woke"] for account in open_table(url).manifests().values())
        skipped = len(woke) // 4  # until all have begun
        steady = (woke[-1] - woke[skipped]) / (len(woke) - 1 - skipped)
        ratios.append(steady * workers / bare)
        show(
            f"{workers} workers: {steady * workers:.3f} s a unit and worker, ratio {ratios[-1]:.3f}; "
            f"the first unit after {arrived[1] - arrived[0]:.1f} s"
        )
    assert max(ratios) < 1.1


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> str:
    """LATENTS of 512 scenes."""
    return encode_scenes(tmp_path_factory.mktemp("run"), count=512)


def bare_step_seconds(url: str) -> float:
    """Seconds of a step of a plain PyTorch loop over rows in memory, with the same sleeping teacher."""
    table = open_table(url)
    rows = to_batch(table.read_unit(table.units[0], ["id", "latent"]).slice(0, SHARE))
    model, objective = student(256), SleepingObjective()
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(30):
        if step == 10:
            began = time.monotonic()
        objective(model, rows, step=step).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return (time.monotonic() - began) / 20


def test_training(ray_cluster, latents: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_num_threads(1)
    bare, ratios = bare_step_seconds(latents), []
    show = shown(f"training, {SHARE} rows a worker", rows=SHARE, bare=bare, capsys=capsys)
    for workers in WORKERS:
        reports: list[dict[str, Any]] = []
        began = time.monotonic()
        run_trainings(
            trainings,
            {"workers": workers, "steps": 120, "url": latents},
            store_url=str(tmp_path / f"checkpoints-{workers}"),
            settings=TrainerSettings(num_workers=workers, cpus_per_worker=0.25, checkpoint_every=1_000),
            on_report=lambda report, to=reports: to.append({**report, "arrived": time.monotonic()}),
        )
        seconds = seconds_per_step(reports)  # without the first, and without the time of reporting
        ratios.append(seconds / bare)
        show(
            f"{workers} workers: {seconds:.3f} s a step, ratio {ratios[-1]:.3f}; "
            f"the first step after {reports[0]['arrived'] - began:.1f} s"
        )
    assert max(ratios) < 1.2


def controller_mib(run: Callable[[], object]) -> int:
    """Peak resident MiB of the Ray Train controller that `run` starts."""
    peaks, ended = [0], threading.Event()

    def sample() -> None:
        while not ended.wait(0.2):
            for pid in descendants(os.getpid()):
                with contextlib.suppress(OSError):  # it ended meanwhile
                    status = Path(f"/proc/{pid}/status").read_text()
                    if Path(f"/proc/{pid}/cmdline").read_text().startswith("ray::TrainController"):
                        peaks.extend(int(kib) // 1024 for kib in re.findall(r"VmHWM:\s+(\d+)", status))

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        run()
    finally:
        ended.set()
        sampler.join()
    return max(peaks)


def idle(config: dict[str, Any]) -> None:
    time.sleep(2)


def test_a_controller_is_no_larger_than_rays_own(ray_cluster, latents, tmp_path, capsys) -> None:
    """Beside a TorchTrainer whose loop is empty."""
    stock = TorchTrainer(
        idle,
        train_loop_config={},
        scaling_config=ScalingConfig(num_workers=1),
        run_config=RunConfig(storage_path=str(tmp_path)),
    )
    own = {
        "store_url": str(tmp_path / "checkpoints"),
        "settings": TrainerSettings(cpus_per_worker=0.25),
        "on_report": lambda report: None,
    }
    mib = {
        "stock": controller_mib(stock.fit),
        "own": controller_mib(
            lambda: run_trainings(trainings, {"workers": 1, "steps": 10, "url": latents}, **own)
        ),
    }
    with capsys.disabled():
        print(f"\nresident memory of Ray Train's controller, MiB: {mib}")
    assert 0 < mib["own"] < mib["stock"] + 20


def test_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A command with nothing to do, a dry run, and one that generates one row."""
    (tmp_path / "captions.txt").write_text("a red circle\n")
    words = [f"captions.url={tmp_path}/captions.txt", "pairs.generation.steps=1"]
    command = [sys.executable, "-m", "jobs.generate_pairs", "--out", str(tmp_path / "run")]
    command += set_options(words)
    seconds = {}
    for name, more in (("dry run", ["--dry-run"]), ("one row", []), ("nothing to do", [])):
        began = time.monotonic()
        subprocess.run([*command, *more], check=True, capture_output=True)
        seconds[name] = time.monotonic() - began
    with capsys.disabled():
        print("\nstart: " + ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items()))
    assert seconds["nothing to do"] < seconds["one row"]
