"""Finds the columns of a caption list, and holds its rows before they are checked."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from pipelines.rejections import Rejected
from pipelines.sources import SourceError
from pipelines.sources.layouts import SPELLINGS, find_column
from pipelines.sources.settings import CaptionSettings


@dataclass(frozen=True)
class CaptionFields:
    """The caption and the id of a row as the format has them, or why it cannot be parsed."""

    caption: str | bytes | None = None
    id: str | bytes | int | float | None = None
    fault: Rejected | None = None


@dataclass(frozen=True, kw_only=True)
class CaptionColumns:
    """Names of the columns, or keys, of captions and of ids; without ids None."""

    caption: str
    id: str | None

    @property
    def names(self) -> list[str]:
        """The columns to read, captions first."""
        return [self.caption] if self.id is None else [self.caption, self.id]


def find_columns(names: Collection[str], settings: CaptionSettings) -> CaptionColumns:
    """The columns of a list with columns of these names.

    Raises:
        SourceError: if there is no column of captions, or the column of ids is missing.
    """
    id_column = settings.id_column
    caption = find_column(names, "caption", given=settings.caption_column)
    return CaptionColumns(caption=caption, id=id_column and find_column(names, "id", given=id_column))


def find_keys(objects: Iterable[dict[str, Any]], settings: CaptionSettings) -> CaptionColumns:
    """The keys of JSON objects, which need not have them all: those of the first that has a caption.

    Raises:
        SourceError: if there are objects, but none with a caption and, where ids are read, an id.
    """
    error: SourceError | None = None
    for row in objects:
        try:
            return find_columns(row.keys(), settings)
        except SourceError as first:
            error = error or first
    if error is not None:
        raise error
    return CaptionColumns(caption=settings.caption_column or SPELLINGS["caption"][0], id=settings.id_column)
