"""Writes the rows of several units of a table as one unit of another."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from pipelines.tables.commits import WrittenUnit, write_unit
from pipelines.tables.table import Snapshot, open_table
from pipelines.tables.unit_files import UnitFile
from pipelines.tables.units import Unit


@dataclass(frozen=True, kw_only=True)
class CompactedUnit:
    """A unit of a compacted table, and the parent's files whose rows it holds, in their order."""

    unit: Unit
    files: tuple[UnitFile, ...]


def concatenated(table: Snapshot, files: Sequence[UnitFile]) -> pa.Table:
    """The rows of some units of a table, one after the other."""
    rows = pa.concat_tables([table.read_unit(file) for file in files])
    # In one chunk, as the writer's pages follow the chunks.
    return rows.combine_chunks()


class CompactUnits:
    """Turns a `CompactedUnit` into a `WrittenUnit`, whose file is in memory once as rows and once as Parquet.

    Args:
        parent: URL of the table that is read.
        version: of it that is read.
        url: of the compacted table.
        settings: digest of its identity.
    """

    def __init__(self, *, parent: str, version: int, url: str, settings: str) -> None:
        self.parent = open_table(parent, version=version)
        self.url = url
        self.settings = settings

    def __call__(self, work: CompactedUnit) -> WrittenUnit:
        """Write the file; one that is there already stays."""
        began = time.monotonic()
        rows = concatenated(self.parent, work.files)
        # Rows that the parent has lost to a deletion request since its version was planned are not read.
        manifest = work.unit.manifest(
            settings=self.settings, environment={}, rows_read=rows.num_rows, rows_written=rows.num_rows
        )
        path = f"{self.url}/{work.unit.name}.parquet"
        return write_unit(rows, manifest, path=path, seconds=time.monotonic() - began)
