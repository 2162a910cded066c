"""Find the rows of the shards that copy an earlier row, or an image or caption of an evaluation.

Reads the shards as `encode_latents` does, and the lists, folders and shards of `deduplication.evaluation`.
With `deduplication.use` LATENTS reject the copies.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobs.cli.inputs import finished_shards, log_refused, row_filters, shards_url
from jobs.cli.job import Job
from jobs.cli.resources import reader, runner
from jobs.cli.state import log_table, rejected_text, state_of
from jobs.cli.verb import recipe_verb
from jobs.runtime.logs import logger
from jobs.runtime.progress import show_progress

if TYPE_CHECKING:
    from pipelines.tables.table import Snapshot


def find(job: Job) -> None:
    """Bring FINGERPRINTS up to date with the shards, and compare all new rows in one round."""
    from pipelines.dedup.duplicates import count_verdicts, find_duplicates
    from pipelines.dedup.fingerprints import fingerprint_shards
    from pipelines.tables.table import open_table

    recipe, settings = job.recipe, job.recipe.deduplication
    table = fingerprint_shards(
        settings.fingerprints,
        latents=recipe.latents,
        shards=finished_shards(job),
        source=recipe.source.name,
        url=job.url(settings.fingerprints.table),
        filters=row_filters(job),
        on_refused=log_refused,
        origin=job.origin({"shards": shards_url(job)}),
        run=runner(job, "deduplication", new_table=job.url(settings.fingerprints.table)),
        on_progress=show_progress(job.verb),
    )
    log_table("FINGERPRINTS", table)
    evaluation = _evaluation(job)
    against = [open_table(url, kind="fingerprints") for url in settings.against]
    parents = {
        "fingerprints": table.lineage(),
        "evaluation": evaluation and evaluation.lineage(),
        "against": [other.lineage() for other in against],
    }
    duplicates = find_duplicates(
        settings,
        fingerprints=table,
        url=job.url(settings.table),
        evaluation=evaluation,
        against=against,
        origin=job.origin(parents),
        read=reader(job, "deduplication"),
    )
    verdicts, rows = count_verdicts(duplicates), duplicates.num_rows
    logger.info(f"  DUPLICATES version {duplicates.version}: {rows} rows, {rejected_text(verdicts)}")
    if rows:
        unique = rows - sum(verdicts.values())
        logger.info(f"  {unique} of them, {unique / rows:.1%}, are no copies")


def preview(job: Job) -> list[str]:
    """Describe the inputs and the output."""
    from pipelines.sources.webdataset import list_shards

    settings = job.recipe.deduplication
    if job.recipe.source.url is not None:
        # Shards of the run itself need not exist yet, others must.
        list_shards(job.recipe.source.url)
    fingerprints, duplicates = job.url(settings.fingerprints.table), job.url(settings.table)
    return [
        f"would read the images of {shards_url(job)} into {fingerprints} ({state_of(fingerprints)})",
        *(f"would read {source} of the evaluation" for source in settings.evaluation.urls),
        *(f"would compare with {other}, whose rows come first" for other in settings.against),
        f"would write verdicts on rows into {duplicates} ({state_of(duplicates)})",
    ]


def _evaluation(job: Job) -> Snapshot | None:
    from pipelines.dedup.decontamination import fingerprint_evaluation

    settings = job.recipe.deduplication
    if not settings.evaluation.urls:
        return None
    table = fingerprint_evaluation(
        settings.fingerprints,
        latents=job.recipe.latents,
        evaluation=settings.evaluation,
        url=job.url(f"{settings.table}-evaluation"),
        origin=job.origin({"evaluation": list(settings.evaluation.urls)}),
        run=runner(job, "deduplication"),
    )
    log_table("FINGERPRINTS of the evaluation", table)
    return table


main = recipe_verb("find_duplicates", find, preview=preview, about=__doc__)

if __name__ == "__main__":
    main.exit()
