"""List the files of a run's tables that nobody reads any more; with --delete, delete them.

Kept are the newest version of each table, every version that a training or another reader holds a lease on,
every version that an unfinished training is pinned to, files younger than `vacuum.hours`, and all files of a
table that another job writes at the moment.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from jobs.cli.job import Job
from jobs.cli.verb import recipe_verb
from jobs.runtime.logs import logger
from pipelines.tables.leases import active_readers, active_writers, remove_expired

if TYPE_CHECKING:
    from pipelines.deletion.vacuum import UnreadFile


DELETE = click.Option(["--delete"], is_flag=True, help="delete the listed files")


def vacuum(job: Job) -> None:
    """List the files table by table, and delete them with --delete."""
    for line in _lines(job, deletes=job.options["delete"]):
        logger.info(line)


def preview(job: Job) -> list[str]:
    """List the files that would be deleted."""
    return list(_lines(job, deletes=False))


def _lines(job: Job, *, deletes: bool) -> list[str]:
    from jobs.deletion.lineage import RunFiles, pinned_versions
    from pipelines.deletion.vacuum import delete_files, unread_files
    from pipelines.tables.table import open_table

    files = RunFiles(job.out)
    tables = {path: open_table(f"{files.url}/{path}") for path in files.tables}
    pinned = pinned_versions(files, tables)
    lines = [f"{files.url} holds no tables"] if not tables else []
    for path, table in tables.items():
        leases = {
            lease.version: lease.holder for lease in active_readers(table.url) if lease.version is not None
        }
        used = {**pinned.get(path, {}), **leases}
        unread = unread_files(table, used=used, hours=job.recipe.vacuum.hours)
        # After the files are listed: who wrote one of them has announced it before.
        if writers := active_writers(table.url):
            lines.append(f"{path}, version {table.version}: kept while {writers[0].holder} writes it")
            continue
        lines.append(f"{path}, version {table.version}: {_summary(unread)}")
        older = sorted(version for version in used if version < table.version)
        lines += [f"  version {version} is kept for {used[version]}" for version in older]
        if deletes:
            delete_files(unread)
            remove_expired(table.url)
    return [*lines, "deleted" if deletes else "nothing was deleted; --delete does it"]


def _summary(unread: Sequence[UnreadFile]) -> str:
    if not unread:
        return "nothing to delete"
    counts = Counter(file.why for file in unread)
    reasons = ", ".join(f"{count} {why}" for why, count in sorted(counts.items()))
    return f"{len(unread)} files to delete, {sum(file.size for file in unread) / 1e6:.1f} MB ({reasons})"


main = recipe_verb("vacuum", vacuum, preview=preview, about=__doc__, writes=False, options=[DELETE])

if __name__ == "__main__":
    main.exit()
