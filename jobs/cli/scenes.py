"""Renders the miniature's scenes as img2dataset shards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from jobs.cli.job import Job
from jobs.runtime.logs import logger

if TYPE_CHECKING:
    from jobs.recipes.recipe import SourceSettings
    from pipelines.sources.shards import ShardRow


def render_scenes(job: Job) -> None:
    """Write the recipe's scenes as shards; existing shards are not written again."""
    from pipelines.sources.shards import write_shard

    source, url = job.recipe.source, job.url("shards")
    size = source.scenes_per_shard
    for index, start in enumerate(range(0, source.scenes, size)):
        rows = _rows(range(start, min(start + size, source.scenes)), source=source)
        write_shard(url, rows, index=index, extension="png", rows_per_shard=size)
    logger.info(f"  {source.scenes} scenes in {url}")


def _rows(positions: range, *, source: SourceSettings) -> Iterator[ShardRow]:
    from pipelines.sources.shards import ShardRow
    from pipelines.tables.schemas import to_png
    from snapfusion.mini.scenes import HELD_OUT, captioned_image, held_out_index, scene_of
    from snapfusion.mini.training.noisy_captions import noisy_caption
    from snapfusion.noise import noise_key, uniform

    for position in positions:
        index = held_out_index(position, split=source.split)
        # Held-out images: the bundled miniature was trained on others.
        image, _ = captioned_image(HELD_OUT + index, seed=source.seed)
        kind, choice = map(float, uniform(noise_key("caption", source.seed, index), 2))
        scene, noise = scene_of(HELD_OUT + index), source.caption_noise
        caption = noisy_caption(scene, noise, kind=kind, choice=choice)
        yield ShardRow(image=to_png(image), caption=caption, url=f"scene:{source.seed}/{index}")


def preview(job: Job) -> list[str]:
    """Describe the output."""
    return [f"would render {job.recipe.source.scenes} scenes to {job.url('shards')}"]
