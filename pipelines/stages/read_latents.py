"""Reads the rows of a committed unit of LATENTS."""

import hashlib
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.storage.objects import read_bytes
from pipelines.tables.schemas import read_array, read_arrays
from pipelines.tables.table import TableError
from pipelines.tables.units import LatentRows, Unit


@dataclass(frozen=True, kw_only=True)
class LatentFile:
    """A data file of LATENTS from which a unit of TARGETS is to be made.

    `unit` is that unit of TARGETS; its `source_digest` is the SHA-256 of the file.
    """

    unit: Unit
    draw: int
    guided: bool
    path: str


class ReadLatents:
    """Turns a `LatentFile` into `LatentRows`."""

    def __call__(self, file: LatentFile) -> LatentRows:
        """Read the whole file.

        Raises:
            TableError: if its SHA-256 is not that of the committed file.
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
            token_ids=read_array(rows, "token_ids"),
            latents=read_arrays(rows, "latent"),
        )
