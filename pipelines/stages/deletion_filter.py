"""Rejects rows that a deletion request covers, when shards are first read and when units are recomputed."""

import hashlib
from collections.abc import Iterable
from functools import cached_property
from typing import Any, Final

from pipelines.rejections import Rejected
from pipelines.sources.links import Link
from pipelines.sources.webdataset import Sample, Shard
from pipelines.stages.row_filter import RowCheck, RowFilter
from pipelines.tables.deletion_list import DeletionKeys, DeletionList, redacted_id

HASH_COLUMNS: Final = ("sha256", "md5", "hash")
"""Columns of hashes: img2dataset's of the downloaded bytes, and LAION's own number."""


class DeletionFilter(RowFilter):
    """Rejects rows on the deletion list by id, by URL and by any known hash of the image.

    No part of a table's identity: a deletion must not turn a table into another one.
    """

    def __init__(self, deletions: DeletionList) -> None:
        self.list = deletions

    def for_shard(self, shard: Shard) -> RowCheck:
        """The check of a shard's samples by the list as it is when the shard is begun."""
        del shard
        deleted = self.list.read()

        def check(sample: Sample, row_id: str) -> None:
            # Hashing every image costs time, so it is done only if the list has hashes.
            keys = identifiers_of(sample) if deleted.hashes else {"urls": [sample.source_id]}
            if deleted.find(ids=[row_id], **keys):
                raise Rejected("withheld")

        return check

    def check_link(self, link: Link) -> None:
        """Reject a link on the list before its image is downloaded."""
        hashes = [link.metadata[name] for name in HASH_COLUMNS if name in link.metadata]
        if self._deleted.find(ids=[link.id], urls=[link.url], hashes=hashes):
            raise Rejected("withheld")

    @cached_property
    def _deleted(self) -> DeletionKeys:
        """The list as it was at the first link; links come by the million, so it is read once a worker."""
        return self.list.read()

    def __getstate__(self) -> dict[str, object]:
        return {"list": self.list}


class RecordedDeletionFilter(RowFilter):
    """Rejects the rows that were withheld when a unit was made, so that recomputing it gives the same bits.

    Args:
        ids: of those rows, redacted or, in tables of earlier versions, as they are.
    """

    def __init__(self, ids: Iterable[str]) -> None:
        self.ids = frozenset(ids)

    def for_shard(self, shard: Shard) -> RowCheck:
        """The check of any shard's samples."""
        del shard

        def check(_sample: Sample, row_id: str) -> None:
            if not self.ids.isdisjoint((row_id, redacted_id(row_id))):
                raise Rejected("withheld")

        return check


def identifiers_of(sample: Sample) -> dict[str, list[Any]]:
    """The URLs and hashes that identify a sample, as arguments of `DeletionKeys.find`."""
    recorded = [sample.metadata[name] for name in HASH_COLUMNS if name in sample.metadata]
    # Of the bytes in the shard too: img2dataset may have re-encoded the download.
    # md5 is what other data sets list; it protects nothing here.
    own = [hashlib.sha256(sample.image), hashlib.md5(sample.image, usedforsecurity=False)]
    return {"urls": [sample.source_id], "hashes": [*recorded, *(state.hexdigest() for state in own)]}
