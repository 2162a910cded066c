"""States what exists at the URL of a job's output."""

from __future__ import annotations

from collections.abc import Mapping

from pipelines.storage.objects import exists
from pipelines.tables.table import is_table, open_table


def state_of(url: str, *, last: str = "") -> str:
    """Say in words what exists at a URL: a preview puts it in brackets.

    Args:
        url: of a table, a file or a folder.
        last: the file that a folder has only when it is complete.
    """
    if is_table(url):
        return f"{open_table(url).num_rows} rows are committed"
    return "exists already" if exists(f"{url}/{last}" if last else url) else "does not exist yet"


def rejected_text(counts: Mapping[str, int]) -> str:
    """Counts of rejected rows by reason, in words."""
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items())
    return f"{sum(counts.values())} rejected ({reasons})" if counts else "none rejected"
