"""Select, decode and resize against the bare libraries, and from one worker to two; part of `make bench`.

The memory test is part of the suite: a reader holds a unit, whatever the shard's size.
"""

import io
import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.ray_data.execution import PipelineStage, run_on_ray
from pipelines.ray_data.settings import Pool
from pipelines.sources.settings import ShardSettings
from pipelines.sources.shards import ShardRow, write_shard
from pipelines.sources.webdataset import Shard
from pipelines.stages.read import ReadShard
from pipelines.stages.settings import ImageSettings, Selection
from pipelines.stages.shard_work import ShardWork

SIDE = 512
SELECTION = Selection(min_width=256, min_aesthetic=5.0, max_watermark=0.8, max_unsafe=0.5)
BOUNDS = {"shards": ShardSettings(), "images": ImageSettings(), "selection": SELECTION}
READER = {"shapes": ((SIDE, SIDE),), "rows_per_unit": 64, **BOUNDS}


def photograph(n: int, *, size: tuple[int, int]) -> bytes:
    """A JPEG with a photograph's spectrum: noise whose amplitude falls with the frequency."""
    height, width = size
    noise = np.random.Generator(np.random.Philox(n)).standard_normal((height, width, 3))
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None, :])
    frequency[0, 0] = 1.0
    pixels = np.fft.ifft2(np.fft.fft2(noise, axes=(0, 1)) / frequency[..., None], axes=(0, 1)).real
    pixels = 128 + 50 * pixels / pixels.std()
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def shard_of(folder: Path, *, index: int, rows: int, size: tuple[int, int]) -> Shard:
    known = [photograph(n, size=size) for n in range(min(rows, 32))]
    images = [
        ShardRow(
            image=known[n % len(known)],
            caption=f"image {n}",
            metadata={"AESTHETIC_SCORE": 6.0, "pwatermark": 0.1, "punsafe": 0.01, "similarity": 0.31},
            url=f"http://origin/{index}/{n}",
        )
        for n in range(rows)
    ]
    return write_shard(str(folder), images, index=index)


def work_on(shard: Shard) -> ShardWork:
    return ShardWork(shard=shard, source=f"web/{shard.name}", committed=())


def read_ours(shard: Shard) -> int:
    return sum(len(unit.ids) for unit in ReadShard(**READER)(work_on(shard)))


def read_bare(shard: Shard) -> int:
    """The least that these libraries have to do for the same pixels, and no check of anything."""
    rows, data, caption = [], b"", ""
    with tarfile.open(shard.url, mode="r|") as archive:
        for member in archive:
            content = archive.extractfile(member).read()
            if member.name.endswith(".jpg"):
                data = content
            elif member.name.endswith(".json"):
                known = json.loads(content)
            else:
                caption = content.decode()
                if known["AESTHETIC_SCORE"] < 5 or known["pwatermark"] > 0.8 or known["punsafe"] > 0.5:
                    continue
                image = Image.open(io.BytesIO(data)).convert("RGB")
                side = min(image.size)
                left, top = (image.width - side) // 2, (image.height - side) // 2
                box = (left, top, left + side, top + side)
                square = image.resize((SIDE, SIDE), Image.Resampling.LANCZOS, box=box)
                rows.append((np.array(square), caption))
                if len(rows) == READER["rows_per_unit"]:
                    np.stack([pixels for pixels, _ in rows])
                    rows.clear()
    return len(rows)


def seconds_of(read: Callable[[Shard], int], shard: Shard) -> float:
    began = time.process_time()
    read(shard)
    return time.process_time() - began


@pytest.mark.slow
def test_reading_costs_little_more_than_the_libraries(tmp_path, capsys):
    shard = shard_of(tmp_path, index=0, rows=256, size=(720, 960))
    seconds_of(read_ours, shard), seconds_of(read_bare, shard)
    turns = [(seconds_of(read_ours, shard), seconds_of(read_bare, shard)) for _ in range(5)]
    ours, bare = (sorted(column)[len(turns) // 2] for column in zip(*turns, strict=True))
    with capsys.disabled():
        print(
            f"\n{256 / ours:.1f} rows/s and {shard.size / ours / 1e6:.1f} MB/s a core; "
            f"bare {256 / bare:.1f} rows/s; ratio {bare / ours:.3f}"
        )
    assert bare / ours >= 0.8


class CountRows:
    """`ImageRows` in, their number out: a sink that costs nothing."""

    def __call__(self, rows) -> tuple[float, int]:
        return time.time(), len(rows.ids)


def rate_on_ray(shards: list[Shard], *, readers: int) -> float:
    """Rows a second from the first unit that arrives to the last."""
    stages = [
        PipelineStage(build=ReadShard, arguments=READER, pool=Pool(actors=readers, cpus=1.0)),
        PipelineStage(build=CountRows, arguments={}, pool=Pool(cpus=0.1)),
    ]
    results = sorted(run_on_ray([work_on(shard) for shard in shards], stages))
    (first, in_first), (last, _) = results[0], results[-1]
    return (sum(rows for _, rows in results) - in_first) / (last - first)


@pytest.mark.slow
@pytest.mark.ray
def test_two_readers_are_nearly_twice_as_fast(ray_cluster, tmp_path: Path, capsys):
    shards = [shard_of(tmp_path, index=index, rows=320, size=(720, 960)) for index in range(6)]
    rate_on_ray(shards[:2], readers=2)
    one, two, again = (rate_on_ray(shards, readers=readers) for readers in (1, 2, 1))
    growth = two / ((one + again) / 2)
    with capsys.disabled():
        print(
            f"\n{os.cpu_count()} cores: {one:.1f} and {again:.1f} rows/s by one reader, {two:.1f} by two: "
            f"{growth:.2f} times"
        )
    assert growth >= 1.5


def peak_mib(shard: Shard) -> float:
    """The most memory that a process holds that reads a shard."""
    program = (
        "import resource, test_read_throughput as t\n"
        f"t.read_ours(t.Shard(url={shard.url!r}, name={shard.name!r}, size={shard.size}))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    found = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    return float(found.stdout)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_shard(tmp_path: Path):
    small = shard_of(tmp_path, index=0, rows=300, size=(64, 64))
    large = shard_of(tmp_path, index=1, rows=3_000, size=(64, 64))
    assert large.size > 9.9 * small.size
    # What grows with the shard are the sidecar's columns and the keys seen: a few hundred bytes a row.
    assert peak_mib(large) - peak_mib(small) < 8
