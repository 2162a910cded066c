"""Defines filters that reject rows beside the selection: blocklists, duplicates, deletion requests."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

from pipelines.sources.links import Link
from pipelines.sources.webdataset import Sample, Shard

RowCheck = Callable[[Sample, str], None]
"""Raises `Rejected` or lets a sample pass; the second argument is the row's id, `<source>/<sample.id>`."""


class RowFilter(Protocol):
    """Rejects rows of shards; pickled into the workers that read shards."""

    def for_shard(self, shard: Shard) -> RowCheck:
        """The check of this shard's samples; tables are read here, once a shard."""

    def describe(self) -> Mapping[str, Any]:
        """The part of a table's identity that this filter determines; nothing by default."""
        return {}


@runtime_checkable
class LinkFilter(Protocol):
    """Rejects rows of URL lists before their download; pickled into the workers that download."""

    def check_link(self, link: Link) -> None:
        """Raise `Rejected` or let a link pass."""

    def describe(self) -> Mapping[str, Any]:
        """As `RowFilter.describe`."""


def describe_filters(filters: Iterable[RowFilter | LinkFilter]) -> dict[str, Any]:
    """The parts of a table's identity that all of these filters determine."""
    return {name: value for row_filter in filters for name, value in row_filter.describe().items()}
