"""What selection, blocklists and decoder would make of a sample of shards or of URL lists.

Nothing is written and no model is read. The sample is the first rows of shards that lie evenly among all, or
ranges that lie evenly in lists, so it says of the whole what the rows' order allows.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from pipelines.rejections import Rejected, Rejection
from pipelines.sources.layouts import UNKNOWN, Meaning, recognise_layout, text_of
from pipelines.sources.links import LinkList, read_header, read_links
from pipelines.sources.settings import LinkSettings, ShardSettings
from pipelines.sources.webdataset import (
    Sample,
    Shard,
    count_rows,
    metadata_columns,
    read_shard,
    sidecar_failures,
)
from pipelines.stages.image import open_image
from pipelines.stages.row_filter import LinkFilter, RowFilter
from pipelines.stages.select import MEASURES, CandidateRow, check
from pipelines.stages.settings import ImageBounds, Selection

_MAX_SOURCES: Final = 8
_FOOTERS_AT_ONCE: Final = 16
CATEGORIES: Final[tuple[Meaning, ...]] = ("nsfw_tag", "language")
"""Columns that hold one of a few words."""

Source = TypeVar("Source")


@dataclass
class RejectedRows:
    """Rows of one reason, and what was said of the first."""

    rows: int = 0
    example: str = ""


@dataclass
class Preview:
    """What was found in the rows of a sample.

    Attributes:
        places: shards or lists that were looked into.
        rows: looked at.
        kept: of them.
        refused: by reason.
        measures: what bounds look at -> its values, in the rows that have it.
        classes: meaning -> value -> rows.
        columns: in which some row says something.
        layout: of the places.
        text_bytes: ids and captions of the rows that are kept.
    """

    places: int = 0
    rows: int = 0
    kept: int = 0
    refused: dict[str, RejectedRows] = field(default_factory=dict)
    measures: dict[str, list[float]] = field(default_factory=lambda: {one.what: [] for one in MEASURES})
    classes: dict[Meaning, Counter[str]] = field(
        default_factory=lambda: {name: Counter() for name in CATEGORIES}
    )
    columns: set[str] = field(default_factory=set)
    layout: str = ""
    text_bytes: int = 0

    @property
    def share(self) -> float:
        """Of the rows looked at, those kept, 0 to 1; 0 of none."""
        return self.kept / self.rows if self.rows else 0.0

    def measure(self, metadata: Mapping[str, Any], caption: str) -> None:
        """Remember what bounds look at."""
        row = CandidateRow(metadata, caption)
        self.columns.update(metadata)
        for measure in MEASURES:
            value = measure.of(row)
            if value is not None:
                self.measures[measure.what].append(value)
        for meaning in CATEGORIES:
            word = text_of(metadata, meaning)
            if word is not None:
                self.classes[meaning][word] += 1

    def keep(self, *texts: str) -> None:
        """Count a row that is kept, with what of it is stored as text."""
        self.rows += 1
        self.kept += 1
        self.text_bytes += sum(len(text.encode()) for text in texts)

    def refuse(self, verdict: Rejected) -> None:
        """Count a row that is not."""
        self.rows += 1
        reason = self.refused.setdefault(verdict.reason, RejectedRows(example=verdict.detail))
        reason.rows += 1


def preview_shards(
    shards: Sequence[Shard],
    *,
    rows: int,
    source: str,
    reading: ShardSettings,
    selection: Selection,
    pictures: ImageBounds,
    vetoes: Sequence[RowFilter] = (),
) -> Preview:
    """Judge about `rows` rows as `pipelines.stages.read` does; each picture is decoded, and dropped.

    Rows that only a tar's sidecar knows stand at the tar's end; they are sampled by their share of it.

    Raises:
        OSError: if the store does not answer.
    """
    looked = Preview()
    for shard, share in _spread(shards, rows):
        looked.places += 1
        checks = [veto.on(shard) for veto in vetoes]
        for row in _rows_of(shard, reading, share=share):
            try:
                if isinstance(row, Rejected):
                    raise row
                looked.measure(row.metadata, row.caption)
                check(row.metadata, caption=row.caption, selection=selection)
                id_ = f"{source}/{row.id}"
                for check_row in checks:
                    check_row(row, id_)
                open_image(row.image, bounds=pictures)
                looked.keep(id_, row.source_id, row.caption)
            except Rejected as verdict:
                looked.refuse(verdict)
    looked.layout = recognise_layout(metadata_columns(shards[0], reading)) if shards else UNKNOWN
    return looked


def preview_links(
    lists: Sequence[LinkList],
    *,
    rows: int,
    columns: LinkSettings,
    selection: Selection,
    vetoes: Sequence[LinkFilter] = (),
) -> Preview:
    """Judge about `rows` rows as those who download do; nothing is fetched.

    Raises:
        SourceError: if a list is not readable, or has no column of URLs or captions.
        OSError: if the store does not answer.
    """
    looked = Preview()
    layouts: dict[str, None] = {}
    for links, share in _spread(lists, rows):
        looked.places += 1
        header = read_header(links, columns)
        layouts[f"{header.layout}, read by {header.url_column} and {header.caption_column}"] = None
        for start, stop in _ranges(header.rows, share):
            for row in read_links(links, columns, start=start, stop=stop):
                try:
                    if isinstance(row, Rejection):
                        raise Rejected(row.reason, row.detail)
                    looked.measure(row.metadata, row.caption)
                    check(row.metadata, caption=row.caption, selection=selection)
                    for veto in vetoes:
                        veto.check_link(row)
                    looked.keep(row.id, row.url, row.caption)
                except Rejected as verdict:
                    looked.refuse(verdict)
    looked.layout = "; ".join(layouts)
    return looked


def count_shard_rows(shards: Sequence[Shard]) -> tuple[int, int]:
    """Rows of the shards by the footers of their Parquet files, and how many shards have none."""
    with ThreadPoolExecutor(_FOOTERS_AT_ONCE) as pool:
        counts = list(pool.map(count_rows, shards))
    return sum(count for count in counts if count is not None), counts.count(None)


def count_link_rows(lists: Sequence[LinkList], columns: LinkSettings) -> int:
    """Rows of the lists by their footers.

    Raises:
        SourceError: if one is not readable.
    """
    with ThreadPoolExecutor(_FOOTERS_AT_ONCE) as pool:
        return sum(pool.map(lambda links: read_header(links, columns).rows, lists))


def _spread(places: Sequence[Source], rows: int) -> Iterator[tuple[Source, int]]:
    """At most 8 of the places, evenly among all, each with its share of the rows."""
    count = min(len(places), _MAX_SOURCES, rows)
    for number in range(count):
        yield places[number * len(places) // count], (rows + number) // count


def _ranges(rows: int, share: int) -> Iterator[tuple[int, int]]:
    """`share` of `rows` ordinals, in up to 8 ranges that begin evenly among all."""
    count = min(_MAX_SOURCES, share) if share <= rows // 2 else 1
    for number in range(count):
        start = number * rows // count
        yield start, min(start + (share + number) // count, rows)


def _rows_of(shard: Shard, reading: ShardSettings, *, share: int) -> Iterator[Sample | Rejected]:
    total, failures = count_rows(shard), sidecar_failures(shard)
    if total is None or share >= total:
        failures = []
    told = round(share * len(failures) / total) if total else 0
    yield from failures[:told]
    for row in itertools.islice(read_shard(shard, reading), share - told):
        yield Rejected(row.reason, row.detail) if isinstance(row, Rejection) else row
