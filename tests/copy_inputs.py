"""Photographs that are like none of the others, copies of them, and shards of both."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from in_process import in_process
from PIL import Image, ImageEnhance

from pipelines.datasets.settings import LatentsSettings
from pipelines.dedup.decontamination import fingerprint_evaluation
from pipelines.dedup.fingerprints import fingerprint_shards
from pipelines.dedup.settings import EvaluationSet, FingerprintsSettings
from pipelines.sources.shards import ShardRow, write_shard
from pipelines.sources.webdataset import list_shards
from pipelines.stages.settings import ImageSettings
from pipelines.tables.table import Snapshot

LATENTS = LatentsSettings(rows_per_unit=4, images=ImageSettings(min_side=8))
SETTINGS = FingerprintsSettings(rows_per_unit=5)


def photograph(n: int, *, side: int = 240) -> Image.Image:
    """A smooth random image: it has low frequencies, as photographs do, and every n has others."""
    coarse = np.random.Generator(np.random.Philox(n)).integers(0, 256, (7, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, *, quality: int = 95) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def near_copies(n: int) -> dict[str, bytes]:
    """Changes that the web makes to an image."""
    image = photograph(n)
    return {
        "encoded again": encoded(image, quality=40),
        "half the size": encoded(image.resize((120, 120), Image.Resampling.LANCZOS)),
        "brighter": encoded(ImageEnhance.Brightness(image).enhance(1.05)),
        "an edge cut off": encoded(image.crop((1, 0, 240, 240))),
    }


def row(
    n: int, *, image: bytes | None = None, caption: str | None = None, url: str | None = None
) -> ShardRow:
    """Row n, which is like no other but for what is given."""
    return ShardRow(
        image=encoded(photograph(n)) if image is None else image,
        caption=f"photograph number {n}" if caption is None else caption,
        url=f"http://origin/{n}.jpg" if url is None else url,
    )


def write_shards(folder: Path, shards: Sequence[Sequence[ShardRow]], *, first: int = 0) -> None:
    for index, rows in enumerate(shards, start=first):
        write_shard(str(folder), rows, index=index, rows_per_shard=100)


def fingerprinted(folder: Path, url: Path, **options: object) -> Snapshot:
    options = {"latents": LATENTS, "source": "web", "run": in_process, **options}
    return fingerprint_shards(SETTINGS, shards=list_shards(str(folder)), url=str(url), **options)


def evaluated(evaluation: EvaluationSet, url: Path) -> Snapshot:
    return fingerprint_evaluation(
        SETTINGS, latents=LATENTS, evaluation=evaluation, url=str(url), run=in_process
    )
