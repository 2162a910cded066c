"""Encodes images and generates pairs through Ray, as a run does."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jobs.gpu_check.device_load import DeviceLoad
from jobs.gpu_check.settings import CheckSize
from pipelines.sources.shards import ShardRow, write_shard
from pipelines.tables.schemas import to_png
from pipelines.tables.table import open_table
from snapfusion.models.network_sizes import network_sizes

_CAPTION = "a picture of something"
_JOBS = {"encode_latents": "latents", "generate_pairs": "pairs"}


def measure_tables(size: CheckSize, folder: Path) -> dict[str, Any]:
    """Rows a second of each table's worker, and how busy the device was while the job ran."""
    run, shards = folder / "run", folder / "shards"
    write_images(size, shards)
    results = {}
    for verb, table in _JOBS.items():
        with DeviceLoad(size) as load:
            run_job(verb, arguments(size, out=run, shards=shards))
        written = open_table(str(run / table))
        seconds = sum(record.seconds or 0.0 for record in written.unit_records())
        results[verb] = {
            "rows": written.num_rows,
            "rows_a_second": written.num_rows / seconds,
            "device_busy": load.busy_share,
        }
    return results


def write_images(size: CheckSize, folder: Path) -> None:
    """Write smooth images of the model's size as a shard, unless it is there."""
    if folder.exists():
        return
    side = network_sizes(size.model).bundle.image_size
    ramp = np.linspace(0, 255, side, dtype=np.float32)

    def image(number: int) -> ShardRow:
        flat = np.full((side, side), number, np.float32)
        across, along = np.add.outer(ramp, ramp) / 2, np.add.outer(ramp, 255 - ramp) / 2
        pixels = np.stack([across, along, flat], axis=-1).astype(np.uint8)
        return ShardRow(image=to_png(pixels), caption=_CAPTION, url=f"http://origin/{number}")

    rows = (image(number) for number in range(size.images))
    write_shard(str(folder), rows, index=0, extension="png", rows_per_shard=size.images)


def arguments(size: CheckSize, *, out: Path, shards: Path) -> list[str]:
    """Options of the jobs."""
    device = f'{{"kind":"{size.device}","dtype":"bfloat16"}}'
    return [
        "--recipe",
        size.recipe,
        "--out",
        str(out),
        *as_options(settings(size, shards)),
        *as_options(
            [
                f"latents.device={device}",
                f"pairs.device={device}",
                f"pairs.rows_per_unit={size.unit_rows}",
                f"pairs.generation.steps={size.steps}",
                f"captions.limit={size.images // 2}",
            ]
        ),
    ]


def settings(size: CheckSize, shards: Path) -> list[str]:
    """Settings of a run on the check's images."""
    return [
        f"model={size.model}",
        f"source.url={shards}",
        f"latents.rows_per_unit={size.unit_rows}",
        "latents.readers.actors=2",
    ]


def as_options(assignments: Sequence[str]) -> list[str]:
    """As --set options."""
    return [word for one in assignments for word in ("--set", one)]


def run_job(verb: str, options: Sequence[str]) -> None:
    """Run a job in a process of its own.

    Raises:
        RuntimeError: if it fails.
    """
    code = subprocess.run([sys.executable, "-m", f"jobs.{verb}", *options], check=False).returncode
    if code:
        raise RuntimeError(f"jobs.{verb} ended with {code}; its lines are in the part's log")
