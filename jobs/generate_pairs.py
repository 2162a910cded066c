"""Draw the captions with the teacher, into the table PAIRS. SnapFusion Sec. 3.2.

Reads the recipe's `captions.url`, or the captions of LATENTS in the same run.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

from jobs.cli.inputs import deletion_list_of
from jobs.cli.job import Job, run
from jobs.runtime.cluster import runner
from jobs.runtime.exit_codes import exit_process
from jobs.runtime.progress import show_progress
from pipelines.datasets.pairs import captions_of, generate_pairs, withhold_deleted
from pipelines.rejections import Rejection
from pipelines.sources.captions import Caption, read_captions
from pipelines.sources.settings import CaptionSettings
from pipelines.tables.table import is_table, open_table


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m jobs.generate_pairs`."""
    return run("generate_pairs", generate, preview=preview, about=__doc__, argv=argv)


def generate(job: Job) -> None:
    """Bring PAIRS up to the recipe; what is committed already is not made again."""
    recipe = job.recipe
    captions, parent = captions_for(job)
    table = generate_pairs(
        recipe.pairs,
        teacher=recipe.model,
        captions=captions,
        source=recipe.captions.name,
        url=job.url("pairs"),
        origin=job.origin({"captions": parent, "model": recipe.model}),
        run=runner(recipe.cluster),
        on_progress=show_progress(job.verb),
    )
    print(f"  PAIRS version {table.version}: {table.num_rows} rows in {len(table.units)} units")


def captions_for(job: Job) -> tuple[list[Caption | Rejection], dict[str, Any]]:
    """The recipe's caption list, or else the captions of LATENTS; and what identifies them.

    What the run was asked to forget is withheld.
    """
    wanted, forgotten = job.recipe.captions, deletion_list_of(job).read()
    if wanted.url is None:
        table = open_table(job.url("latents"), kind="latents")
        return withhold_deleted(captions_of(table, limit=wanted.limit), forgotten), table.lineage()
    listed = islice(read_captions(wanted.url, CaptionSettings()), wanted.limit)
    return withhold_deleted(listed, forgotten), {"list": wanted.url}


def preview(job: Job) -> list[str]:
    """What would be read and written."""
    place, wanted = job.url("pairs"), job.recipe.captions
    held = f"{open_table(place).num_rows} rows are committed" if is_table(place) else "a new table"
    generation = job.recipe.pairs.generation
    return [
        f"would draw the captions of {wanted.url or job.url('latents')} {job.recipe.pairs.draws} times, "
        f"{generation.steps} steps at guidance {generation.guidance}, into {place} ({held})"
    ]


if __name__ == "__main__":
    exit_process(main())
