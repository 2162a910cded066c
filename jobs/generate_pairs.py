"""Generate images of captions with the teacher into the table PAIRS. SnapFusion Sec. 3.2.

Reads the recipe's `captions.url`, or the captions of LATENTS in the same run.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from jobs.cli.caption_list import preview_list
from jobs.cli.inputs import deletion_list_of
from jobs.cli.job import Job
from jobs.cli.resources import runner
from jobs.cli.state import log_table, state_of
from jobs.cli.verb import recipe_verb
from jobs.runtime.progress import show_progress
from pipelines.rejections import Rejection

if TYPE_CHECKING:
    from pipelines.sources.captions import Caption


def generate(job: Job) -> None:
    """Bring PAIRS up to date with the recipe; committed units are not made again."""
    from pipelines.datasets.pairs import generate_pairs
    from snapfusion.models.source import absolute_source

    recipe = job.recipe
    captions, parent = captions_for(job)
    progress = show_progress(job.verb)
    table = generate_pairs(
        recipe.pairs,
        teacher=absolute_source(recipe.model),
        captions=captions,
        source=recipe.captions.name,
        url=job.url("pairs"),
        origin=job.origin({"captions": parent, "model": recipe.model}),
        run=runner(job, "pairs", new_table=job.url("pairs")),
        on_progress=progress,
    )
    log_table("PAIRS", table, network_busy=progress.network_busy)


def captions_for(job: Job) -> tuple[Sequence[Caption | Rejection], dict[str, Any]]:
    """The recipe's caption list, or else the captions of LATENTS; and what identifies them.

    Captions on the run's deletion list are withheld.
    """
    from pipelines.datasets.pairs import captions_of, withhold_deleted, withhold_if_deleted
    from pipelines.sources.captions import list_captions
    from pipelines.tables.table import open_table

    settings, deleted = job.recipe.captions, deletion_list_of(job).read()
    if settings.url is None:
        table = open_table(job.url("latents"), kind="latents")
        return withhold_deleted(captions_of(table, limit=settings.limit), deleted), table.lineage()
    listed = list_captions(settings.url, settings.reading, limit=settings.limit)
    return listed.map(partial(withhold_if_deleted, deleted)), {"list": settings.url}


def preview(job: Job) -> list[str]:
    """Describe the inputs and the output."""
    url, pairs = job.url("pairs"), job.recipe.pairs
    given, rows = job.recipe.captions, job.recipe.source.sample_rows
    captions = given.url or job.url("latents")
    return [
        *preview_list(given.url, given.reading, rows=min(rows, given.limit or rows)),
        f"would generate {pairs.draws} images of each caption of {captions}, {pairs.generation.steps} steps "
        f"at guidance {pairs.generation.guidance_text}, into {url} ({state_of(url)})",
    ]


main = recipe_verb("generate_pairs", generate, preview=preview, about=__doc__)

if __name__ == "__main__":
    main.exit()
