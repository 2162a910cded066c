"""Refuses rows that copy earlier ones, by the verdicts that a table DUPLICATES holds on their shard."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import pyarrow.compute as pc

from pipelines.rejections import Rejected
from pipelines.sources.webdataset import Sample, Shard
from pipelines.stages.read import shard_digest
from pipelines.stages.row_filter import RowCheck
from pipelines.tables.manifest import UnitManifest, covers_source
from pipelines.tables.table import Snapshot, TableError, UnitFile, open_table


class DuplicateFilter:
    """A `Veto` by the verdicts of one version of DUPLICATES.

    Args:
        url: of the table.
        version: of it; later rounds say nothing else of the shards that this one knows.
        source: the short name of the set of shards.
    """

    def __init__(self, *, url: str, version: int, source: str) -> None:
        self.url = url
        self.version = version
        self.source = source
        self.identity = open_table(url, version=version, kind="duplicates").identity

    def on(self, shard: Shard) -> RowCheck:
        """The check of this shard's rows; of them only those that are refused are held.

        Raises:
            TableError: if verdicts on the shard, or on a part of it, are not there.
        """
        found = self._files[f"{self.source}/{shard.name}"]
        if not covers_source(account for account, _ in found):
            raise TableError(
                f"{self.url} has no verdicts on all rows of {shard.url}: run jobs.find_duplicates first"
            )
        for account, _ in found:
            if account.source_digest != shard_digest(shard):
                raise TableError(f"{self.url} has verdicts on another shard of the name {shard.name}")
        refused: dict[str, tuple[str, str]] = {}
        for _, file in found:
            rows = self._table.read_unit(file)
            copies = rows.filter(pc.is_valid(rows.column("verdict"))).to_pylist()
            refused.update({row["id"]: (row["verdict"], row["of"]) for row in copies})

        def check(_sample: Sample, row_id: str) -> None:
            if row_id in refused:
                reason, of = refused[row_id]
                raise Rejected(reason, f"of {of}")

        return check

    def describe(self) -> Mapping[str, Any]:
        """What counts as a copy. The version is no part of it: what is judged stays judged."""
        told = {
            name: value for name, value in self.identity.items() if name not in ("kind", "schema_version")
        }
        return {"duplicates": told}

    @cached_property
    def _table(self) -> Snapshot:
        return open_table(self.url, version=self.version)

    @cached_property
    def _files(self) -> Mapping[str, list[tuple[UnitManifest, UnitFile]]]:
        """The units of this version by the source that they judge; read once in each worker."""
        known = open_table(self.url).manifests()
        files = defaultdict(list)
        for file in self._table.units:
            files[known[file.unit].source].append((known[file.unit], file))
        return files

    def __getstate__(self) -> dict[str, Any]:
        # Workers look the units up by themselves.
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}
