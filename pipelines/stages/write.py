"""Writes a finished unit as one Parquet file, exactly once."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa

from pipelines.tables.commits import WrittenUnit, write_unit
from pipelines.tables.schemas import array_type, to_png
from pipelines.tables.units import FinishedRows


class WriteUnit:
    """Turns `FinishedRows` into a `WrittenUnit`.

    The file is named after the unit alone, so that two workers on one unit write one file.
    """

    def __init__(self, *, url: str, schema: pa.Schema, settings: str) -> None:
        self.url = url
        self.schema = schema
        self.settings = settings

    def __call__(self, rows: FinishedRows) -> WrittenUnit:
        """Pack the rows and write them with their manifest; a file that is there already stays."""
        table = pack(rows, self.schema)
        manifest = rows.unit.manifest(
            settings=self.settings,
            environment=rows.environment,
            rows_read=rows.unit.rows_read,
            rows_written=table.num_rows,
            rejections=rows.rejections,
        )
        path = f"{self.url}/{rows.unit.name}.parquet"
        return replace(write_unit(table, manifest, path=path, seconds=rows.seconds), span=rows.span)


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
