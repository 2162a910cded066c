"""Settings of exports."""

from typing import Final, Literal

from pydantic import Field

from pipelines.ray_data.settings import Pool
from pipelines.stages.settings import Device
from snapfusion.settings import Settings

FORMATS: Final = ("webdataset",)
"""Layouts that tables are exported in."""

EXPORT_RECORD: Final = "export.json"
"""Name of the record in an export's folder: the table, its version and lineage, and the members."""


class ExportSettings(Settings):
    """Settings of `jobs.export_table`; all but the last change the files.

    Attributes:
        rows_per_shard: rows of the table that one tar covers.
        embedding_dtype: of the encoded captions.
        batch_size: captions in a forward pass of the text encoder; fixed, because bits depend on it.
        device: of the text encoder.
        exporters: the actor pool that encodes captions and writes shards.
    """

    rows_per_shard: int = Field(1_000, ge=1)
    embedding_dtype: Literal["float16", "float32"] = "float16"
    batch_size: int = Field(16, ge=1)
    device: Device = Device()
    exporters: Pool = Pool()
