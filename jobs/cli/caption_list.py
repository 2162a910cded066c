"""Samples the caption list of a recipe in a dry run: a wrong path or column is found before the run."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from typing import TYPE_CHECKING

from jobs.cli.state import rejected_text
from jobs.recipes.recipe import EXAMPLE_BUCKET

if TYPE_CHECKING:
    from pipelines.sources.settings import CaptionSettings


def preview_list(url: str | None, reading: CaptionSettings, *, rows: int) -> list[str]:
    """How many of the first `rows` of a list are usable; nothing without a list, or of a recipe's example.

    Raises:
        SourceError: if the list does not exist, has an unknown format, or lacks a column.
    """
    from pipelines.rejections import Rejection
    from pipelines.sources.captions import read_captions

    if url is None or url.startswith(EXAMPLE_BUCKET):
        return []
    first = list(islice(read_captions(url, reading), rows))
    rejected = Counter(row.reason for row in first if isinstance(row, Rejection))
    usable = len(first) - rejected.total()
    return [f"sampled {len(first)} rows of {url}: {usable} captions, {rejected_text(rejected)}"]
