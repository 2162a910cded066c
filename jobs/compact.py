"""Write a table of LATENTS, PAIRS or TARGETS anew in fewer, larger files: the same rows, ids and order.

Give the table's URL. The new table lies beside it, so that deletion requests reach both; the old one stays as
it is, and trainings that are pinned to it go on there.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import click

from jobs.cli.job import Job
from jobs.cli.resources import runner
from jobs.cli.state import log_table, state_of
from jobs.cli.verb import recipe_verb
from jobs.runtime.logs import logger
from jobs.runtime.progress import show_progress
from pipelines.storage.objects import absolute_url
from snapfusion.settings import FOLDER_NAME, SettingsError

if TYPE_CHECKING:
    from pipelines.tables.commits import Origin
    from pipelines.tables.table import Snapshot

OPTIONS = [
    click.Option(["--name"], metavar="NAME", help="of the new table; by default the old one's, -compacted")
]


def compact(job: Job) -> None:
    """Write the missing units of the new table, and print what it holds."""
    from pipelines.datasets.compaction import compact_table
    from pipelines.tables.compacted import compaction_of
    from pipelines.tables.table import open_table

    def origin(planned: Snapshot) -> Origin:
        return job.origin({"table": planned.lineage()})

    parent, url = open_table(job.target), _new_url(job)
    table = compact_table(
        parent,
        job.recipe.compaction,
        url=url,
        origin=origin,
        run=runner(job, "compaction", new_table=url),
        on_progress=show_progress(job.verb),
    )
    log_table(url.rpartition("/")[2], table, note=f" of {len(parent.units)} units")
    made_of = (compaction_of(table.identity) or {}).get("version")
    if made_of != parent.version:
        logger.info(f"  made of version {made_of} of {parent.url}, which is at version {parent.version}")


def preview(job: Job) -> list[str]:
    """Describe both tables."""
    from pipelines.tables.table import open_table

    parent, url = open_table(job.target), _new_url(job)
    return [
        f"would write {parent.num_rows} rows of {parent.url}, version {parent.version}, from "
        f"{len(parent.units)} files into files of {job.recipe.compaction.file_mib:g} MiB in {url} "
        f"({state_of(url)})"
    ]


def _new_url(job: Job) -> str:
    """URL of the new table."""
    run, _, parent = absolute_url(job.target).rpartition("/")
    name = job.options["name"] or f"{parent}-compacted"
    if not re.fullmatch(FOLDER_NAME, name) or name == parent:
        raise SettingsError(f"--name {name!r}: the name of another table in the same run is accepted")
    return f"{run}/{name}"


main = recipe_verb(
    "compact", compact, preview=preview, about=__doc__, target="URL", writes=False, options=OPTIONS
)

if __name__ == "__main__":
    main.exit()
