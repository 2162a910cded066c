"""Vetoes on rows that a run is asked to forget: they are not read in, be it for the first time or again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, Final

from pipelines.forgotten import Forgotten, ForgottenList
from pipelines.rejection import Rejected
from pipelines.sources.webdataset import Sample, Shard
from pipelines.stages.veto import Check

HASHES: Final = ("sha256", "md5", "hash")
"""Columns of hashes: img2dataset's of the downloaded bytes, and LAION's own number."""


class Withhold:
    """Refuses what is on the list, by id, by address, and by any hash that is known of the picture.

    It is no part of a table's identity: what is forgotten must go without making a table another one.
    """

    def __init__(self, forgotten: ForgottenList) -> None:
        self.list = forgotten

    def on(self, shard: Shard) -> Check:
        """The check of a shard's samples, by the list as it is when the shard is begun."""
        del shard
        forgotten = self.list.read()

        def check(sample: Sample, id_: str) -> None:
            if is_on(forgotten, sample, id_):
                raise Rejected("withheld")

        return check

    def describe(self) -> Mapping[str, Any]:
        """Nothing."""
        return {}


class WithholdAgain:
    """Refuses the rows that were withheld when a unit was made, so that it can be made again as it was.

    Args:
        ids: of those rows.
    """

    def __init__(self, ids: Iterable[str]) -> None:
        self.ids = frozenset(ids)

    def on(self, shard: Shard) -> Check:
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


def is_on(forgotten: Forgotten, sample: Sample, id_: str) -> bool:
    """Whether a sample is on the list, under whatever name."""
    if forgotten.has_id(id_) or forgotten.has_url(sample.source_id):
        return True
    if not forgotten.hashes:
        return False
    told = (sample.metadata.get(name) for name in HASHES)
    if any(forgotten.has_hash(value) for value in told if value is not None):
        return True
    # Of the bytes in the shard, which img2dataset may have encoded anew.
    own = (hashlib.sha256(sample.image), hashlib.md5(sample.image, usedforsecurity=False))
    return any(forgotten.has_hash(state.hexdigest()) for state in own)
