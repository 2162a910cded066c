"""Verify a table: count rows again, compare files and log, and recompute sampled units.

With --repair, first repair whatever follows from the data files: commits that the log has lost, and rows of
`.rejects` and `.units` that are missing or were changed.

Give the table's URL. LATENTS need their shards: the recipe's `source.url`, or `shards` beside the table.
TARGETS need `latents` beside the table. SAMPLES and REFERENCES need the `evaluation` settings of their run.
"""

from __future__ import annotations

import click

from jobs.cli.job import Job
from jobs.cli.recomputers import recompute_for
from jobs.cli.verb import recipe_verb
from jobs.runtime.logs import logger

_MAX_FAULTS = 20
"""Faults that are listed."""


REPAIR = click.Option(["--repair"], is_flag=True, help="first repair what follows from the data files")


class VerificationFailed(RuntimeError):
    """A table with faults."""


def verify(job: Job) -> None:
    """Print what was repaired and verified; raise if there are faults."""
    from pipelines.tables.repair import repair_table
    from pipelines.tables.table import open_table
    from pipelines.tables.verification import verify_table

    table, settings = open_table(job.target), job.recipe.verification
    if job.options.get("repair"):
        repair = repair_table(table)
        for done, units in (("committed again", repair.committed), ("records rewritten", repair.rewritten)):
            logger.info(f"  {done}: {', '.join(units) or 'no unit'}")
        table = open_table(job.target)
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
        remedy = f"; --repair mends {result.repairable} of them" if result.repairable else ""
        raise VerificationFailed(f"{len(result.faults)} faults in {table.url}{remedy}")
    logger.info("  no fault found")


def preview(job: Job) -> list[str]:
    """Describe the table and the units that would be recomputed."""
    from pipelines.tables.table import open_table

    table = open_table(job.target)
    units = min(job.recipe.verification.units, len(table.units))
    repair = ["would repair it first"] if job.options.get("repair") else []
    return [
        *repair,
        f"would read {len(table.units)} units of {table.url}, version {table.version}, and recompute {units} "
        "of them",
    ]


main = recipe_verb(
    "verify_table", verify, preview=preview, about=__doc__, target="URL", writes=False, options=[REPAIR]
)

if __name__ == "__main__":
    main.exit()
