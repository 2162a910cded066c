"""States what exists at the URL of a job's output, and reads the records there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jobs.runtime.logs import logger
from pipelines.storage.objects import exists, list_names
from pipelines.storage.records import read_record

if TYPE_CHECKING:
    from pipelines.tables.table import Snapshot


def state_of(url: str, *, last: str = "") -> str:
    """Say in words what exists at a URL: a preview puts it in brackets.

    Args:
        url: of a table, a file or a folder.
        last: the file that a folder has only when it is complete.
    """
    from pipelines.tables.table import is_table, open_table

    if is_table(url):
        return f"{open_table(url).num_rows} rows are committed"
    return "exists already" if exists(f"{url}/{last}" if last else url) else "does not exist yet"


def read_json(url: str) -> Any:  # noqa: ANN401 - a record of the kind that the caller expects
    """The object of a JSON file, or None if there is no such file."""
    return read_record(url) if exists(url) else None


def read_json_files(url: str) -> list[Any]:
    """The objects of a folder's JSON files in order of their names; none if there is no such folder."""
    return [read_record(f"{url}/{name}") for name in list_names(url) if name.endswith(".json")]


def log_table(name: str, table: Snapshot, *, note: str = "", network_busy: float | None = None) -> None:
    """Log the rows of a table, its rejected rows by reason, and how busy its network was.

    Args:
        name: of the table.
        table: at its newest version.
        note: on its rows.
        network_busy: see `TableProgress`.

    Raises:
        NoUsableRows: if every row was rejected, for another reason than a deletion request.
    """
    from pipelines.tables.manifest import total_rejected
    from pipelines.tables.usable_rows import check_usable

    rows = f"{table.num_rows} rows{note} in {len(table.units)} units"
    counts = total_rejected(table.manifests().values())
    logger.info(f"  {name} version {table.version}: {rows}, {rejected_text(counts)}")
    if network_busy is not None:
        busy = f"{network_busy:.1%} of the time between the first and last units of its workers"
        logger.info(f"  its network computed in {busy}")
    check_usable(name, table)


def rejected_text(counts: Mapping[str, int]) -> str:
    """Counts of rejected rows by reason, in words."""
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items())
    return f"{sum(counts.values())} rejected ({reasons})" if counts else "none rejected"
