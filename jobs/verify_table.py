"""Verify a table: count rows again, compare files and log, and recompute sampled units.

Give the table's URL. LATENTS need their shards: the recipe's `source.url`, or `shards` beside the table.
TARGETS need `latents` beside the table. SAMPLES and REFERENCES need the `evaluation` settings of their run.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NoReturn

from jobs.cli.inputs import latents_row_filters, row_filters, teacher_and_student
from jobs.cli.job import Job
from jobs.cli.verb import recipe_verb
from jobs.evaluation.settings import Contender
from jobs.runtime.logs import logger

if TYPE_CHECKING:
    import pyarrow as pa

    from pipelines.tables.manifest import UnitManifest
    from pipelines.tables.table import Snapshot
    from pipelines.tables.verification import Recompute


_MAX_FAULTS = 20
"""Faults that are listed."""


class VerificationFailed(RuntimeError):
    """A table with faults."""


def verify(job: Job) -> None:
    """Print what was verified; raise if there are faults."""
    from pipelines.tables.table import open_table
    from pipelines.tables.verification import verify_table

    table, settings = open_table(job.target), job.recipe.verification
    result = verify_table(
        table, recompute=recompute_for(job, table), units=settings.units, seed=settings.seed
    )
    rows = f"{result.units} units, {result.rows} rows, {result.rejected} rejected"
    logger.info(f"{table.url}, version {table.version}: {rows}")
    logger.info(f"  {result.recomputed} units recomputed, {result.exact} of them bit for bit")
    for note in result.notes:
        logger.info(f"  {note}")
    if result.faults:
        for fault in result.faults[:_MAX_FAULTS]:
            logger.error(f"  {fault}")
        raise VerificationFailed(f"{len(result.faults)} faults in {table.url}")
    logger.info("  no fault found")


def recompute_for(job: Job, table: Snapshot) -> Recompute:
    """The function that recomputes units of this kind of table."""
    from pipelines.datasets import latents, pairs, references, samples, targets
    from pipelines.dedup import fingerprints
    from pipelines.sources.webdataset import list_shards
    from pipelines.tables.table import open_table

    recipe, kind = job.recipe, table.identity["kind"]
    parent, _, name = job.target.rpartition("/")
    run_job, source = replace(job, out=parent), recipe.source.name
    match kind:
        case "pairs":
            return pairs.recomputer(table, teacher=recipe.model)
        case "targets":
            teacher, _ = teacher_and_student(run_job)
            return targets.recomputer(
                table, teacher=teacher, latents=open_table(f"{parent}/latents", kind="latents")
            )
        case "samples":
            # `jobs.evaluate` writes them to OUT/evaluation/NAME.
            run_job = replace(job, out=parent.rpartition("/")[0])
            contenders = {contender.name: contender for contender in recipe.evaluation.contenders}
            contender = contenders.get(name, Contender(name=name))
            return samples.recomputer(
                table,
                settings=recipe.evaluation.samples,
                model=run_job.resolve(contender.model or recipe.model),
                decoder=contender.decoder and run_job.resolve(contender.decoder),
            )
        case "references":
            settings = recipe.evaluation
            return references.recomputer(
                table, settings=settings.references, metrics=settings.samples.judging
            )
        case "duplicates":
            return _cannot_recompute
    shards = list_shards(recipe.source.url or f"{parent}/shards")
    if kind == "fingerprints":
        return fingerprints.recomputer(table, shards=shards, source=source, filters=row_filters(run_job))
    return latents.recomputer(
        table, model=recipe.model, shards=shards, source=source, filters=latents_row_filters(run_job)
    )


def _cannot_recompute(manifest: UnitManifest, _rows: pa.Table) -> NoReturn:
    from pipelines.tables.verification import CannotRecompute

    raise CannotRecompute(f"its round is made as a whole, and {manifest.unit} is a part of it")


def preview(job: Job) -> list[str]:
    """Describe the table and the units that would be recomputed."""
    from pipelines.tables.table import open_table

    table = open_table(job.target)
    units = min(job.recipe.verification.units, len(table.units))
    return [
        f"would read {len(table.units)} units of {table.url}, version {table.version}, and recompute {units} "
        "of them"
    ]


main = recipe_verb("verify_table", verify, preview=preview, about=__doc__, target="URL", writes=False)

if __name__ == "__main__":
    main.exit()
