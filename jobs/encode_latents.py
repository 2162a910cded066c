"""Encode the images of shards with the VAE into the table LATENTS.

Reads the recipe's `source.url`, or the run's own shards. With --dry-run it samples `source.sample_rows` of
their rows, or of the URL lists of `download.links` while there are no shards, and shows how many would be
kept and why.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobs.cli.inputs import finished_shards, latents_row_filters, log_refused, shards_url
from jobs.cli.job import Job
from jobs.cli.resources import runner
from jobs.cli.state import log_table, state_of
from jobs.cli.verb import recipe_verb
from jobs.recipes.recipe import EXAMPLE_BUCKET
from jobs.runtime.logs import logger
from jobs.runtime.progress import show_progress
from pipelines.storage.objects import exists

if TYPE_CHECKING:
    from pipelines.sources.webdataset import Shard


def encode(job: Job) -> None:
    """Bring LATENTS up to date with the recipe; committed units are not made again."""
    from pipelines.datasets.latents import encode_latents
    from snapfusion.models.source import absolute_source

    recipe = job.recipe
    shards = finished_shards(job)
    _print_unused_bounds(job, shards[0])
    progress = show_progress(job.verb)
    table = encode_latents(
        recipe.latents,
        model=absolute_source(recipe.model),
        shards=shards,
        source=recipe.source.name,
        url=job.url(recipe.source.table),
        filters=latents_row_filters(job),
        on_refused=log_refused,
        origin=job.origin({"shards": shards_url(job), "model": recipe.model}),
        run=runner(job, "latents", new_table=job.url(recipe.source.table)),
        on_progress=progress,
    )
    log_table("LATENTS", table, network_busy=progress.network_busy)


def preview(job: Job) -> list[str]:
    """Describe the inputs and the output."""
    url = job.url(job.recipe.source.table)
    return [f"would encode {shards_url(job)} into {url} ({state_of(url)})"]


def sampled_preview(job: Job) -> list[str]:
    """The same, and what would be kept of a sample of the shards, or of the URL lists if there are none."""
    from jobs.reports.selection_preview import link_preview_lines, shard_preview_lines
    from pipelines.sources.webdataset import list_shards

    url = shards_url(job)
    lines = [*preview(job), ""]
    if job.recipe.source.url is not None or exists(url):
        return [*lines, *shard_preview_lines(job, list_shards(url))]
    if job.recipe.download.links is not None:
        return [*lines, *link_preview_lines(job)]
    return [*lines, f"nothing to sample yet: there are no shards at {url}, and download.links is not set"]


def preview_given(job: Job) -> list[str]:
    """`sampled_preview` of shards that the recipe names; those that the run is to make cannot be sampled."""
    url = job.recipe.source.url
    return preview(job) if url is None or url.startswith(EXAMPLE_BUCKET) else sampled_preview(job)


def _print_unused_bounds(job: Job, shard: Shard) -> None:
    """Print which bounds reject nothing, because the shards have no column for them."""
    from jobs.reports.selection_preview import unused_bound_lines
    from pipelines.sources.webdataset import metadata_columns
    from pipelines.stages.select import active_bounds

    settings = job.recipe.latents
    if any(active_bounds(settings.selection)):
        for line in unused_bound_lines(settings.selection, metadata_columns(shard, settings.shards)):
            logger.info(f"  {line}")


main = recipe_verb("encode_latents", encode, preview=sampled_preview, about=__doc__)

if __name__ == "__main__":
    main.exit()
