"""A committed unit of LATENTS to its rows."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.storage.objects import read_bytes
from pipelines.tables.schemas import array_type, read_arrays
from pipelines.tables.table import TableError
from pipelines.tables.units import LatentRows, Unit


@dataclass(frozen=True, kw_only=True)
class LatentFile:
    """A data file of LATENTS, to be read for a draw of the branch that `guided` names.

    `unit` is the unit to make of it; its `source_digest` is the SHA-256 of the file.
    """

    unit: Unit
    draw: int
    guided: bool
    path: str


class ReadLatents:
    """`LatentFile` in, `LatentRows` out."""

    def __call__(self, file: LatentFile) -> LatentRows:
        """Read the file whole.

        Raises:
            TableError: if it is not the file that was committed.
        """
        data = read_bytes(file.path)
        if hashlib.sha256(data).hexdigest() != file.unit.source_digest:
            raise TableError(f"{file.path} is not the file that was committed: its SHA-256 differs")
        rows = pq.read_table(pa.BufferReader(data))
        return LatentRows(
            unit=file.unit,
            draw=file.draw,
            guided=file.guided,
            ids=rows["id"].to_pylist(),
            source_ids=rows["source_id"].to_pylist(),
            token_ids=array_type(rows.schema.field("token_ids")).unpack(rows["token_ids"].to_pylist()),
            latents=read_arrays(rows, "latent"),
        )
