"""Vetoes on rows that a run is asked to forget: they are not read in, be it for the first time or again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any, Final

from pipelines.rejections import Rejected
from pipelines.sources.links import Link
from pipelines.sources.webdataset import Sample, Shard
from pipelines.stages.row_filter import RowCheck
from pipelines.tables.deletion_list import DeletionKeys, DeletionList

HASH_COLUMNS: Final = ("sha256", "md5", "hash")
"""Columns of hashes: img2dataset's of the downloaded bytes, and LAION's own number."""


class DeletionFilter:
    """Refuses what is on the list, by id, by address, and by any hash that is known of the picture.

    It is no part of a table's identity: what is forgotten must go without making a table another one.
    """

    def __init__(self, forgotten: DeletionList) -> None:
        self.list = forgotten

    def on(self, shard: Shard) -> RowCheck:
        """The check of a shard's samples, by the list as it is when the shard is begun."""
        del shard
        forgotten = self.list.read()

        def check(sample: Sample, id_: str) -> None:
            names = identifiers_of(sample) if forgotten.hashes else {"urls": [sample.source_id]}
            if forgotten.find(ids=[id_], **names):
                raise Rejected("withheld")

        return check

    def check_link(self, link: Link) -> None:
        """Refuse what is on the list before its picture is downloaded."""
        told = [link.metadata[name] for name in HASH_COLUMNS if name in link.metadata]
        if self._at_first.find(ids=[link.id], urls=[link.url], hashes=told):
            raise Rejected("withheld")

    @cached_property
    def _at_first(self) -> DeletionKeys:
        """The list as it was when the first link was asked about: links come by the million."""
        return self.list.read()

    def __getstate__(self) -> dict[str, object]:
        return {"list": self.list}

    def describe(self) -> Mapping[str, Any]:
        """Nothing."""
        return {}


class RecordedDeletionFilter:
    """Refuses the rows that were withheld when a unit was made, so that it can be made again as it was.

    Args:
        ids: of those rows.
    """

    def __init__(self, ids: Iterable[str]) -> None:
        self.ids = frozenset(ids)

    def on(self, shard: Shard) -> RowCheck:
        """The check of any shard's samples."""
        del shard

        def check(sample: Sample, id_: str) -> None:
            del sample
            if id_ in self.ids:
                raise Rejected("withheld")

        return check

    def describe(self) -> Mapping[str, Any]:
        """Nothing."""
        return {}


def identifiers_of(sample: Sample) -> dict[str, list[Any]]:
    """The addresses and hashes that a sample goes by, for `DeletionKeys.find`."""
    told = [sample.metadata[name] for name in HASH_COLUMNS if name in sample.metadata]
    # Of the bytes in the shard, which img2dataset may have encoded anew.
    own = [hashlib.sha256(sample.image), hashlib.md5(sample.image, usedforsecurity=False)]
    return {"urls": [sample.source_id], "hashes": [*told, *(state.hexdigest() for state in own)]}
