"""What may refuse a row beside the selection: blocked things, earlier copies, requests to forget."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

from pipelines.sources.links import Link
from pipelines.sources.webdataset import Sample, Shard

RowCheck = Callable[[Sample, str], None]
"""Lets a sample pass, or raises `Rejected`; the second argument is its row's id, `<source>/<sample.id>`."""


class RowFilter(Protocol):
    """Refuses rows; pickled into the workers that read shards."""

    def on(self, shard: Shard) -> RowCheck:
        """The check of this shard's samples; what it needs of a table is read here, once a shard."""
        ...

    def describe(self) -> Mapping[str, Any]:
        """What of it determines rows: part of the identity of the table made under it. Empty for none."""
        ...


@runtime_checkable
class LinkFilter(Protocol):
    """A veto that can judge a row before its picture is downloaded; pickled into those who download."""

    def check_link(self, link: Link) -> None:
        """Let a link pass, or raise `Rejected`."""
        ...

    def describe(self) -> Mapping[str, Any]:
        """As a `RowFilter` does."""
        ...
