"""Stream shards through the VAE encoder into the table LATENTS.

Reads the recipe's `source.url`, or the shards that lie in the run. With --dry-run it looks at
`source.sample_rows` of their rows, or of the URL lists of `download.links` while there are no shards, and
tells what would be kept and why.
"""

from __future__ import annotations

from collections.abc import Sequence

from jobs.cli.inputs import latents_row_filters, shards_url
from jobs.cli.job import Job, run
from jobs.reports.selection_preview import link_preview_lines, shard_preview_lines, unused_bound_lines
from jobs.runtime.cluster import runner
from jobs.runtime.exit_codes import exit_process
from jobs.runtime.progress import show_progress
from pipelines.datasets.latents import encode_latents
from pipelines.sources.webdataset import Shard, list_shards, metadata_columns
from pipelines.stages.select import set_bounds
from pipelines.storage.objects import exists
from pipelines.tables.manifest import total_rejected
from pipelines.tables.table import is_table, open_table


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m jobs.encode_latents`."""
    return run("encode_latents", encode, preview=sampled_preview, about=__doc__, argv=argv)


def encode(job: Job) -> None:
    """Bring LATENTS up to the recipe; what is committed already is not made again."""
    recipe = job.recipe
    shards = list_shards(shards_url(job))
    _print_unused_bounds(job, shards[0])
    table = encode_latents(
        recipe.latents,
        model=recipe.model,
        shards=shards,
        source=recipe.source.name,
        url=job.url(recipe.source.table),
        vetoes=latents_row_filters(job),
        origin=job.origin({"shards": shards_url(job), "model": recipe.model}),
        run=runner(recipe.cluster),
        on_progress=show_progress(job.verb),
    )
    rejected = total_rejected(list(table.manifests().values()))
    counted = f"{table.num_rows} rows in {len(table.units)} units, {_rejections(rejected)}"
    print(f"  LATENTS version {table.version}: {counted}")


def preview(job: Job) -> list[str]:
    """What would be read and written."""
    place = job.url(job.recipe.source.table)
    held = f"{open_table(place).num_rows} rows are committed" if is_table(place) else "a new table"
    return [f"would encode {shards_url(job)} into {place} ({held})"]


def sampled_preview(job: Job) -> list[str]:
    """The same, and what would be kept of a sample of the shards, or of URL lists while there are none."""
    url = shards_url(job)
    lines = [*preview(job), ""]
    if job.recipe.source.url is not None or exists(url):
        return [*lines, *shard_preview_lines(job, list_shards(url))]
    if job.recipe.download.links is not None:
        return [*lines, *link_preview_lines(job)]
    return [*lines, f"there is nothing to look at yet: no shards at {url}, and download.links is not set"]


def _print_unused_bounds(job: Job, shard: Shard) -> None:
    """Say once which bounds refuse nothing, because the shards know nothing of what they look at."""
    settings = job.recipe.latents
    if any(set_bounds(settings.selection)):
        for line in unused_bound_lines(settings.selection, metadata_columns(shard, settings.shards)):
            print(f"  {line}")


def _rejections(rejected: dict[str, int]) -> str:
    reasons = ", ".join(f"{count} {reason}" for reason, count in rejected.items())
    return f"{sum(rejected.values())} rejected ({reasons})" if rejected else "none rejected"


if __name__ == "__main__":
    exit_process(main())
