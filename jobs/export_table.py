"""Export a table of LATENTS, PAIRS or TARGETS in a layout that other training programs read.

Give the table's URL. Captions are encoded by the text encoder of the recipe's model, and noise is computed
from the rows' keys. A killed export continues at the first shard that is not whole.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import click

from jobs.cli.inputs import deletion_list_of
from jobs.cli.job import Job
from jobs.cli.resources import runner
from jobs.cli.verb import recipe_verb
from jobs.runtime.logs import logger
from jobs.runtime.progress import show_progress
from pipelines.exports.settings import FORMATS
from pipelines.storage.objects import absolute_url, check_client

if TYPE_CHECKING:
    from pipelines.tables.table import Snapshot

OPTIONS = [
    click.Option(["--to"], type=click.Choice(FORMATS), required=True, help="the layout"),
    click.Option(["--folder"], metavar="URL", help="of the export; by default export/NAME beside the table"),
]


def export(job: Job) -> None:
    """Write the missing shards, and print what the export holds."""
    from pipelines.exports.webdataset import export_webdataset
    from pipelines.tables.table import open_table
    from snapfusion.models.source import absolute_source

    table, folder = _version(job), _folder(job)
    done = export_webdataset(
        table,
        job.recipe.export,
        model=absolute_source(job.recipe.model),
        folder=folder,
        deleted=deletion_list_of(_run_of(job)),
        run=runner(job, "export"),
        on_progress=show_progress(job.verb),
    )
    shards = f"{done.shards} shards, {done.written} written now"
    logger.info(f"  {done.folder}: {done.samples} samples in {shards}")
    if left_out := done.rows - done.samples:
        logger.info(f"  {left_out} rows are on the deletion list and were left out; run jobs.forget again")
    newest = open_table(table.url).version
    if newest > done.version:
        logger.info(f"  exported is version {done.version} of {table.url}, which is at version {newest}")


def preview(job: Job) -> list[str]:
    """Describe the table and the shards."""
    table, rows = _version(job), job.recipe.export.rows_per_shard
    shards = -(-table.num_rows // rows)
    return [
        f"would write {table.num_rows} rows of {table.url}, version {table.version}, into {shards} shards of "
        f"{_folder(job)}, with captions encoded by {job.recipe.model}"
    ]


def _version(job: Job) -> Snapshot:
    """The version of the table that is exported."""
    from pipelines.exports.record import exported_version
    from pipelines.tables.table import open_table

    return exported_version(open_table(job.target), _folder(job))


def _folder(job: Job) -> str:
    """URL of the export."""
    run, _, name = absolute_url(job.target).rpartition("/")
    folder = absolute_url(job.options["folder"] or f"{run}/export/{name}")
    check_client(folder)
    return folder


def _run_of(job: Job) -> Job:
    """The job in the run that the table lies in."""
    return replace(job, out=absolute_url(job.target).rpartition("/")[0])


main = recipe_verb(
    "export_table", export, preview=preview, about=__doc__, target="URL", writes=False, options=OPTIONS
)

if __name__ == "__main__":
    main.exit()
