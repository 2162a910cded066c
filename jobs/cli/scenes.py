"""Renders the miniature's scenes as img2dataset shards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from jobs.cli.job import Job
from jobs.runtime.logs import logger

if TYPE_CHECKING:
    from pipelines.sources.shards import ShardRow


def render_scenes(job: Job) -> None:
    """Write the recipe's scenes as shards; existing shards are not written again."""
    from pipelines.sources.shards import write_shard

    source, url = job.recipe.source, job.url("shards")
    size = source.scenes_per_shard
    for index, start in enumerate(range(0, source.scenes, size)):
        rows = _rows(start, min(start + size, source.scenes), seed=source.seed)
        write_shard(url, rows, index=index, extension="png", rows_per_shard=size)
    logger.info(f"  {source.scenes} scenes in {url}")


def _rows(start: int, stop: int, *, seed: int) -> Iterator[ShardRow]:
    from pipelines.sources.shards import ShardRow
    from pipelines.tables.schemas import to_png
    from snapfusion.mini.scenes import HELD_OUT, captioned_image

    for index in range(start, stop):
        # Held-out scenes: the bundled miniature was trained on the others.
        image, caption = captioned_image(HELD_OUT + index, seed=seed)
        yield ShardRow(image=to_png(image), caption=caption, url=f"scene:{seed}/{index}")


def preview(job: Job) -> list[str]:
    """Describe the output."""
    return [f"would render {job.recipe.source.scenes} scenes to {job.url('shards')}"]
