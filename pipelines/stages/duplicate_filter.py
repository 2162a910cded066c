"""Rejects duplicates by the verdicts that a DUPLICATES table holds on a shard."""

from collections import defaultdict
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import pyarrow.compute as pc

from pipelines.rejections import Rejected
from pipelines.sources.webdataset import Sample, Shard
from pipelines.stages.row_filter import RowCheck
from pipelines.stages.shard_work import shard_digest
from pipelines.tables.manifest import UnitManifest, covers_source, in_order
from pipelines.tables.table import Snapshot, TableError, open_table
from pipelines.tables.unit_files import UnitFile


class DuplicateFilter:
    """Rejects rows by the verdicts of one version of DUPLICATES.

    Args:
        url: of the table.
        version: of the table; later rounds give the same verdicts on the shards that this one knows.
        source: the short name of the set of shards.
    """

    def __init__(self, *, url: str, version: int, source: str) -> None:
        self.url = url
        self.version = version
        self.source = source
        self.identity = open_table(url, version=version, kind="duplicates").identity

    def for_shard(self, shard: Shard) -> RowCheck:
        """The check of this shard's rows; memory holds the rejected ones alone.

        Raises:
            TableError: if the table has no verdicts on the shard, or on a part of it only.
        """
        units = self._units[f"{self.source}/{shard.name}"]
        manifests = in_order(manifest for manifest, _ in units)
        if not covers_source(manifests):
            raise TableError(f"{self.url} lacks verdicts on rows of {shard.url}: run jobs.find_duplicates")
        # A shard that was torn at first has units of each of its sizes.
        if manifests[-1].source_digest != shard_digest(shard):
            raise TableError(
                f"{self.url} has verdicts on another shard of the name {shard.name}: if it was torn, run "
                "jobs.find_duplicates"
            )
        duplicates: dict[str, tuple[str, str]] = {}
        for _, file in units:
            rows = self._table.read_unit(file)
            rejected = rows.filter(pc.is_valid(rows.column("verdict"))).to_pylist()
            duplicates.update({row["id"]: (row["verdict"], row["of"]) for row in rejected})

        def check(_sample: Sample, row_id: str) -> None:
            if row_id in duplicates:
                reason, of = duplicates[row_id]
                raise Rejected(reason, f"of {of}")

        return check

    def describe(self) -> Mapping[str, Any]:
        """The rules for duplicates; not the version, because a verdict once given never changes."""
        rules = {name: rule for name, rule in self.identity.items() if name not in ("kind", "schema_version")}
        return {"duplicates": rules}

    @cached_property
    def _table(self) -> Snapshot:
        return open_table(self.url, version=self.version)

    @cached_property
    def _units(self) -> Mapping[str, list[tuple[UnitManifest, UnitFile]]]:
        """The units of this version by their source; read once in each worker."""
        manifests = open_table(self.url).manifests()
        units = defaultdict(list)
        for file in self._table.units:
            manifest = manifests[file.unit]
            units[manifest.source].append((manifest, file))
        return units

    def __getstate__(self) -> dict[str, Any]:
        # Workers read the units themselves: a table of many units is large to pickle.
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}
