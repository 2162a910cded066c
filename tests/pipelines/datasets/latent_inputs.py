"""Shards and settings that tests of LATENTS and TARGETS share."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from in_process import in_process

from pipelines.datasets.latents import encode_latents
from pipelines.datasets.settings import LatentsSettings
from pipelines.sources.shards import ShardRow, write_shard
from pipelines.sources.webdataset import list_shards
from pipelines.stages.settings import ImageSettings
from pipelines.tables.manifest import read_manifest, to_parquet
from pipelines.tables.schemas import to_png
from pipelines.tables.verification import verify_table

SETTINGS = LatentsSettings(rows_per_unit=4, images=ImageSettings(min_side=8))


def noise_image(n: int) -> bytes:
    return to_png(np.random.Generator(np.random.Philox(n)).integers(0, 256, (20, 24, 3), dtype=np.uint8))


def make_shards(folder: Path, *, shards: int = 2, rows: int = 10, bad: tuple[int, ...] = (3,)) -> Path:
    for index in range(shards):
        images = [b"this is text" if n in bad else noise_image(100 * index + n) for n in range(rows)]
        shard_rows = [
            ShardRow(image=image, caption=f"picture {n}", url=f"http://origin/{index}/{n}")
            for n, image in enumerate(images)
        ]
        write_shard(str(folder), shard_rows, index=index, extension="png", rows_per_shard=100)
    return folder


def encode(url: Path | str, folder: Path, model: str, *, settings=SETTINGS, run=in_process, **more):
    shards = list_shards(str(folder))
    return encode_latents(settings, model=model, shards=shards, source="web", url=str(url), run=run, **more)


def first_units(count: int):
    """A runner that is stopped after some units."""

    def run(items, stages):
        for number, written in enumerate(in_process(items, stages)):
            if number == count:
                return
            yield written

    return run


def data_files(url: Path | str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(url).glob("*.parquet"))}


def verify(table, recompute, *, units: int = 99):
    return verify_table(table, recompute=recompute, units=units, seed=0)


def with_column(rows: pa.Table, name: str, values: list) -> pa.Table:
    index = rows.schema.get_field_index(name)
    field = rows.schema.field(index)
    return rows.set_column(index, field, pa.array(values, field.type))


def forge(path: Path, *, column: str, values: list | None = None) -> None:
    """Give a column other values, or swap its first two: a well-formed file with a true manifest."""
    manifest, rows = read_manifest(path.read_bytes()), pq.read_table(path)
    first, second, *others = rows[column].to_pylist()
    forged = with_column(rows, column, values or [second, first, *others])
    path.write_bytes(to_parquet(forged, manifest))


def copy_table(table, url: Path) -> Path:
    for ending in ("", ".rejects", ".units"):
        shutil.copytree(f"{table.url}{ending}", f"{url}{ending}")
    return url
