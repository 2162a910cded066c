"""Recipes `sd15`, `sd2`, `own` at full size with random weights: a unit of LATENTS, of TARGETS, two steps."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from memory_meter import MemoryMeter, available_gib
from set_options import set_options

from jobs import compute_targets, distill_steps, encode_latents
from pipelines.sources.shards import ShardRow, write_shard
from pipelines.tables.schemas import to_png
from pipelines.tables.table import open_table

# Recipe: its model with random weights, the side of a latent, and the GiB that training takes.
SIZES = {
    "sd15": ("random:sd15-v", 64, 19),
    "sd2": ("random:sd2", 96, 21),
    "own": ("random:sd15-v", 64, 20),
}
ROWS = 2
THREADS = 2

# Everything that is not here is the recipe's own.
SETTINGS = (
    f"latents.rows_per_unit={ROWS}",
    "latents.encoding.batch_size=1",
    f'latents.device={{"kind":"cpu","dtype":"float32","threads":{THREADS}}}',
    *("latents.readers.actors=1", "latents.encoders.gpus=0"),
    *("targets.draws=1", "targets.cfg_probability=1.0", "targets.teaching.batch_size=1"),
    f'targets.device={{"kind":"cpu","dtype":"bfloat16","threads":{THREADS}}}',
    *("targets.teachers.gpus=0", "targets.writers.actors=1"),
    *("distill.targets=table", "distill.steps.cfg_probability=1.0", "distill.saved_as=float16"),
    *("distill.loader.held_out=0.5", "distill.evaluation_rows=1"),
    *("distill.loop.num_steps=2", "distill.loop.global_batch=1"),
    *("distill.loop.warmup_steps=0", "distill.loop.ema_decay=null"),
    f'distill.trainer={{"micro_batch":1,"curve_every":1,"threads_per_worker":{THREADS}}}',
)


def smooth_image(number: int, *, side: int) -> ShardRow:
    """Smooth colors, so that the image is large and its file is not."""
    ramp = np.linspace(0, 255, side, dtype=np.float32)
    channels = [np.add.outer(ramp, ramp) / 2, np.add.outer(ramp, 255 - ramp) / 2, np.full((side, side), 99.0)]
    pixels = np.stack(channels[number % 3 :] + channels[: number % 3], axis=-1).astype(np.uint8)
    return ShardRow(image=to_png(pixels), caption=f"colors, number {number}!", url=f"http://origin/{number}")


def arguments(name: str, out: Path) -> list[str]:
    settings = [f"model={SIZES[name][0]}", f"source.url={out / 'shards'}", *SETTINGS]
    return ["--recipe", name, "--out", str(out), *set_options(settings)]


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(6 * 3600)
@pytest.mark.parametrize("name", SIZES)
def test_a_recipe_runs_at_full_size(name, ray_cluster, tmp_path, capsys):
    _, side, needed = SIZES[name]
    if available_gib() < needed:
        pytest.skip(f"{available_gib():.1f} GiB of memory are free, {needed} are needed")
    images = (smooth_image(number, side=8 * side) for number in range(ROWS))
    write_shard(str(tmp_path / "shards"), images, index=0, extension="png", rows_per_shard=ROWS)
    for job in (encode_latents, compute_targets, distill_steps):
        with MemoryMeter() as meter:
            assert job.main(arguments(name, tmp_path)) == 0
        with capsys.disabled():
            print(f"\n{name}: {job.__name__} {meter.seconds:.0f} s, {meter.peak_gib:.1f} GiB")
    for kind in ("latents", "targets"):
        table = open_table(str(tmp_path / kind), kind=kind)
        assert (len(table.units), table.num_rows) == (1, ROWS)
    metrics = json.loads((tmp_path / "student-16" / "metrics.json").read_text())
    assert [point["step"] for point in metrics["curve"]] == [1, 2]
    for point in metrics["curve"]:
        assert math.isfinite(point["loss"])
        assert 0.0 < point["grad_norm"] < math.inf
    assert metrics["identity"]["student"]["latent_shape"] == [4, side, side]
    assert metrics["evaluation"]["before"] != metrics["evaluation"]["after"]
    assert (tmp_path / "student-16" / "model" / "model_index.json").exists()
