"""Mistakes that jobs on a table refuse in one line."""

import re
from pathlib import Path

from pipelines.tables.schemas import references_schema
from pipelines.tables.table import create_table


def other_table(folder: Path) -> str:
    """A table of features, which is no training data."""
    return create_table(
        str(folder / "references"), schema=references_schema(features=2), identity={"kind": "references"}
    ).url


def assert_one_line(capsys, message: str) -> None:
    """Assert that stderr has a single line, which matches."""
    [line] = capsys.readouterr().err.splitlines()
    assert re.search(message, line), line
