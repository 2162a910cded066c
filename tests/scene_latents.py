"""Tables of a few of the miniature's scenes, made in this process."""

from collections.abc import Sequence
from pathlib import Path

from in_process import in_process

from jobs.cli.job import Job
from jobs.cli.scenes import render_scenes
from jobs.recipes.registry import recipe_named
from pipelines.datasets.latents import encode_latents
from pipelines.datasets.pairs import captions_of, generate_pairs
from pipelines.sources.webdataset import list_shards
from pipelines.tables.table import open_table


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


def pairs_of(latents: Path, out: Path, settings: Sequence[str]) -> dict[str, bytes]:
    """Data files by name of the PAIRS that the miniature generates from the captions of LATENTS."""
    recipe = recipe_named("mini").with_values(settings)
    generate_pairs(
        recipe.pairs,
        teacher="mini",
        captions=[*captions_of(open_table(str(latents)))],
        source=recipe.captions.name,
        url=str(out),
        run=in_process,
    )
    return data_files(out)


def data_files(table: Path) -> dict[str, bytes]:
    """Data files of a local table by name."""
    return {path.name: path.read_bytes() for path in table.glob("*.parquet")}
