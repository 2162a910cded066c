"""Renders the miniature's scenes as img2dataset shards."""

from __future__ import annotations

from collections.abc import Iterator

from jobs.cli.job import Job
from pipelines.sources.shards import ShardRow, write_shard
from pipelines.tables.schemas import to_png
from snapfusion.mini.scenes import HELD_OUT, captioned_image


def render_scenes(job: Job) -> None:
    """Write the recipe's scenes as shards, except those that exist already."""
    source = job.recipe.source
    for index, start in enumerate(range(0, source.scenes, source.scenes_per_shard)):
        stop = min(start + source.scenes_per_shard, source.scenes)
        write_shard(
            job.url("shards"),
            _images(start, stop, seed=source.seed),
            index=index,
            extension="png",
            rows_per_shard=source.scenes_per_shard,
        )
    print(f"  {source.scenes} scenes in {job.url('shards')}")


def _images(start: int, stop: int, *, seed: int) -> Iterator[ShardRow]:
    for index in range(start, stop):
        # Scenes that the miniature was not trained on.
        image, caption = captioned_image(HELD_OUT + index, seed=seed)
        yield ShardRow(image=to_png(image), caption=caption, url=f"scene:{seed}/{index}")


def preview(job: Job) -> list[str]:
    """Describe what would be written."""
    return [f"would render {job.recipe.source.scenes} scenes to {job.url('shards')}"]
