"""Previews a selection: counts what selection, blocklists and decoder would accept of a sample of rows.

Nothing is written and no model is loaded. The sample is the first rows of shards, or ranges of URL lists,
evenly spread over all of them; it represents the whole as far as rows are in random order.
"""

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, TypeVar

from pipelines.rejections import Rejected, Rejection
from pipelines.sources.layouts import UNKNOWN, Meaning, recognise_layout, text_of
from pipelines.sources.links import Link, LinkList, read_header, read_links
from pipelines.sources.settings import LinkSettings, ShardSettings
from pipelines.sources.webdataset import (
    Sample,
    Shard,
    count_rows,
    metadata_columns,
    read_shard,
    sidecar_failures,
)
from pipelines.stages.bounded_decode import BoundedDecode
from pipelines.stages.image import EncodedImage, open_image
from pipelines.stages.row_filter import LinkFilter, RowCheck, RowFilter
from pipelines.stages.select import MEASURES, CandidateRow, check
from pipelines.stages.settings import ImageBounds, Selection

_MAX_SOURCES: Final = 8
_FOOTERS_AT_ONCE: Final = 16
CATEGORIES: Final[tuple[Meaning, ...]] = ("nsfw_tag", "language")
"""Columns with one of a few words."""

Row = TypeVar("Row", Sample, Link)
Source = TypeVar("Source")


@dataclass
class RejectedRows:
    """The number of rows rejected for one reason, and the detail of the first."""

    rows: int = 0
    example: str = ""


@dataclass
class Preview:
    """Counts over the rows of a sample.

    Attributes:
        num_sources: shards or lists that the sample is from.
        rows: in the sample.
        accepted: of the rows.
        rejected: by reason.
        measures: values of each measure by its name, of the rows that have it.
        categories: meaning -> value -> rows.
        columns: that some row has.
        layout: of the sources.
        text_bytes: of ids and captions of the accepted rows.
    """

    num_sources: int = 0
    rows: int = 0
    accepted: int = 0
    rejected: dict[str, RejectedRows] = field(default_factory=dict)
    measures: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    categories: dict[Meaning, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    columns: set[str] = field(default_factory=set)
    layout: str = ""
    text_bytes: int = 0

    @property
    def accepted_share(self) -> float:
        """Accepted of all rows, 0 to 1; 0 if there are none."""
        return self.accepted / self.rows if self.rows else 0.0

    def add(
        self,
        row: Row | Rejected | Rejection,
        *,
        selection: Selection,
        check_row: Callable[[Row], Sequence[str]],
    ) -> None:
        """Count a row as accepted, with the texts that `check_row` returns for it, or as rejected."""
        self.rows += 1
        try:
            if isinstance(row, Rejected):
                raise row
            if isinstance(row, Rejection):
                raise Rejected(row.reason, row.detail)
            self._measure(row.metadata, row.caption)
            check(row.metadata, caption=row.caption, selection=selection)
            texts = check_row(row)
        except Rejected as rejected:
            of_reason = self.rejected.setdefault(rejected.reason, RejectedRows(example=rejected.detail))
            of_reason.rows += 1
        else:
            self.accepted += 1
            self.text_bytes += sum(len(text.encode()) for text in texts)

    def _measure(self, metadata: Mapping[str, Any], caption: str) -> None:
        row = CandidateRow(metadata, caption)
        self.columns.update(metadata)
        for measure in MEASURES:
            if (value := measure.of(row)) is not None:
                self.measures[measure.name].append(value)
        for meaning in CATEGORIES:
            if (word := text_of(metadata, meaning)) is not None:
                self.categories[meaning][word] += 1


def preview_shards(
    shards: Sequence[Shard],
    *,
    rows: int,
    source: str,
    reading: ShardSettings,
    selection: Selection,
    images: ImageBounds,
    filters: Sequence[RowFilter] = (),
    decode_seconds: float = 60.0,
) -> Preview:
    """Check about `rows` rows as `pipelines.stages.read` does; images are decoded and dropped.

    Rows that only a tar's sidecar has come after those in the tar; they are sampled by their share.

    Raises:
        OSError: if the store does not answer.
    """
    preview = Preview()
    with BoundedDecode(partial(_check_image, bounds=images), seconds=decode_seconds) as check_image:
        for shard, share in _spread(shards, rows):
            preview.num_sources += 1
            checks = [row_filter.for_shard(shard) for row_filter in filters]

            def check_row(row: Sample, checks: Sequence[RowCheck] = checks) -> Sequence[str]:
                id_ = f"{source}/{row.id}"
                for check_filter in checks:
                    check_filter(row, id_)
                check_image(EncodedImage(row.image))
                return id_, row.source_id, row.caption

            for row in _rows_of(shard, reading, share=share):
                preview.add(row, selection=selection, check_row=check_row)
    preview.layout = recognise_layout(metadata_columns(shards[0], reading)) if shards else UNKNOWN
    return preview


def _check_image(image: EncodedImage, *, bounds: ImageBounds) -> None:
    open_image(image, bounds=bounds)


def preview_links(
    lists: Sequence[LinkList],
    *,
    rows: int,
    columns: LinkSettings,
    selection: Selection,
    filters: Sequence[LinkFilter] = (),
) -> Preview:
    """Check about `rows` rows as the download does; nothing is fetched.

    Raises:
        SourceError: if a list is not readable, or has no column of URLs or captions.
        OSError: if the store does not answer.
    """
    preview = Preview()
    layouts: dict[str, None] = {}

    def check_row(row: Link) -> Sequence[str]:
        for link_filter in filters:
            link_filter.check_link(row)
        return row.id, row.url, row.caption

    for links, share in _spread(lists, rows):
        preview.num_sources += 1
        header = read_header(links, columns)
        layouts[f"{header.layout}, read by {header.url_column} and {header.caption_column}"] = None
        for start, stop in _ranges(header.rows, share):
            for row in read_links(links, columns, start=start, stop=stop):
                preview.add(row, selection=selection, check_row=check_row)
    preview.layout = "; ".join(layouts)
    return preview


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


def _spread(sources: Sequence[Source], rows: int) -> Iterator[tuple[Source, int]]:
    """At most 8 evenly spread sources, each with its share of the rows."""
    count = min(len(sources), _MAX_SOURCES, rows)
    for number in range(count):
        yield sources[number * len(sources) // count], (rows + number) // count


def _ranges(rows: int, share: int) -> Iterator[tuple[int, int]]:
    """`share` of `rows` ordinals, in up to 8 evenly spread ranges."""
    count = min(_MAX_SOURCES, share) if share <= rows // 2 else 1
    for number in range(count):
        start = number * rows // count
        yield start, min(start + (share + number) // count, rows)


def _rows_of(shard: Shard, reading: ShardSettings, *, share: int) -> Iterator[Sample | Rejection | Rejected]:
    total, failures = count_rows(shard), sidecar_failures(shard)
    # Whoever reads the whole tar reads its failures too, in their place.
    if total is None or share >= total:
        failures = []
    num_failures = round(share * len(failures) / total) if total else 0
    yield from failures[:num_failures]
    yield from itertools.islice(read_shard(shard, reading), share - num_failures)
