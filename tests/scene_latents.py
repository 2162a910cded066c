"""LATENTS of a few of the miniature's scenes, made in this process."""

from __future__ import annotations

from pathlib import Path

from in_process import in_process

from jobs.cli.job import Job
from jobs.cli.scenes import render_scenes
from jobs.recipes.registry import recipe_named
from pipelines.datasets.latents import encode_latents
from pipelines.sources.webdataset import list_shards


def encode_scenes(out: Path, *, count: int = 16) -> str:
    """Shards and LATENTS of `count` scenes in the folder `out`; returns the table's URL."""
    recipe = recipe_named("mini").with_values([f"source.scenes={count}", f"source.scenes_per_shard={count}"])
    render_scenes(Job(verb="render_scenes", recipe=recipe, out=str(out)))
    table = encode_latents(
        recipe.latents.model_copy(update={"rows_per_unit": count // 4}),
        model="mini-v",
        shards=list_shards(str(out / "shards")),
        source="scenes",
        url=str(out / "latents"),
        run=in_process,
    )
    return table.url
