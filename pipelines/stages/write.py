"""A finished unit to its data file: one Parquet object, written once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from pipelines.storage.objects import write_once
from pipelines.tables.commits import WrittenUnit, read_written_unit
from pipelines.tables.manifest import UnitManifest, to_parquet
from pipelines.tables.schemas import array_type, to_png
from pipelines.tables.units import FinishedRows


class WriteUnit:
    """`FinishedRows` in, `WrittenUnit` out; the file's name is the unit's name and nothing else."""

    def __init__(self, *, url: str, schema: pa.Schema, settings: str) -> None:
        self.url = url
        self.schema = schema
        self.settings = settings

    def __call__(self, rows: FinishedRows) -> WrittenUnit:
        """Pack, account and write. A file that is already there is read back and stands."""
        table = pack(rows, self.schema)
        account = UnitManifest(
            unit=rows.unit.name,
            source=rows.unit.source,
            start=rows.unit.start,
            stop=rows.unit.stop,
            final=rows.unit.final,
            source_digest=rows.unit.source_digest,
            settings=self.settings,
            environment=rows.environment,
            rows_read=rows.unit.rows_read,
            rows_written=table.num_rows,
            rejections=tuple(rows.rejections),
        )
        data = to_parquet(table, account)
        path = f"{self.url}/{rows.unit.name}.parquet"
        if not write_once(path, data):
            return read_written_unit(path, seconds=rows.seconds)
        sha256 = hashlib.sha256(data).hexdigest()
        return WrittenUnit(manifest=account, path=path, size=len(data), sha256=sha256, seconds=rows.seconds)


def pack(rows: FinishedRows, schema: pa.Schema) -> pa.Table:
    """The rows in the table's schema: arrays as bytes, images as PNG."""
    return pa.table([_pack(rows.columns[field.name], field) for field in schema], schema=schema)


def _pack(values: Sequence[Any], field: pa.Field) -> pa.Array:
    metadata = field.metadata or {}
    if b"shape" in metadata:
        return pa.array(array_type(field).pack(values), type=field.type)
    if metadata.get(b"format") == b"png":
        return pa.array([None if value is None else to_png(value) for value in values], type=field.type)
    return pa.array(values, type=field.type)
