"""The record of an export: the table, its version and lineage, and the settings that determine the files."""

import json
from typing import Any, Final

from pipelines.exports.settings import EXPORT_RECORD, ExportSettings
from pipelines.storage.objects import exists, write_once
from pipelines.storage.records import read_record
from pipelines.tables.table import Snapshot, TableError, open_table
from snapfusion.settings import differences, digest

KINDS: Final = ("latents", "pairs", "targets")
"""Kinds of tables that can be exported."""


def exported_version(table: Snapshot, folder: str) -> Snapshot:
    """The version of a table to export: the one that the export in `folder` began with, or else the newest.

    Args:
        table: at its newest version.
        folder: of the export, which need not exist.

    Raises:
        TableError: if tables of this kind are not exported, the export is of another table, or rows of its
            version were deleted since.
    """
    if (kind := table.identity["kind"]) not in KINDS:
        raise TableError(f"{table.url} holds {kind}; {', '.join(KINDS)} can be exported")
    record_url = f"{folder}/{EXPORT_RECORD}"
    if not exists(record_url):
        return table
    record = read_record(record_url)
    made_of = record.get("table", {})
    if made_of.get("identity") != digest(table.identity):
        raise TableError(
            f"{folder} has shards of another table, {made_of.get('table')}; give another --folder"
        )
    pinned = open_table(table.url, version=made_of["version"])
    current = {file.path for file in table.units}
    if not all(file.path in current for file in pinned.units):
        raise TableError(
            f"{folder} has shards of version {pinned.version}, of which rows were deleted on request since; "
            "remove the folder and export again"
        )
    return pinned


def begin_export(
    table: Snapshot,
    settings: ExportSettings,
    *,
    folder: str,
    text_encoder: str,
    scaling_factor: float,
    shards: int,
) -> None:
    """Write the record of an export, or compare the one that is there.

    Args:
        table: the exported version.
        settings: of the export.
        folder: of the export.
        text_encoder: SHA-256 of its weights.
        scaling_factor: of the latents.
        shards: their number.

    Raises:
        TableError: naming the settings that differ.
    """
    identity = {
        "format": "webdataset",
        "table": {"identity": digest(table.identity), "version": table.version},
        "text_encoder": text_encoder,
        "settings": {
            **settings.model_dump(mode="json", include={"rows_per_shard", "embedding_dtype", "batch_size"}),
            "dtype": settings.device.dtype,
        },
    }
    record = {
        **identity,
        "table": table.lineage(),
        "kind": table.identity["kind"],
        "rows": table.num_rows,
        "shards": shards,
        "scaling_factor": scaling_factor,
        "made_by": _origins(table),
    }
    url = f"{folder}/{EXPORT_RECORD}"
    if write_once(url, json.dumps(record, indent=1, sort_keys=True).encode()):
        return
    there = read_record(url)
    there["table"] = {name: there.get("table", {}).get(name) for name in identity["table"]}
    if differing := list(differences({name: there.get(name) for name in identity}, identity)):
        raise TableError(f"{folder} was begun otherwise: {'; '.join(differing[:3])}; give another --folder")


def _origins(table: Snapshot) -> list[Any]:
    """The jobs that made the table's units, each once: recipe, settings, and parents with their versions."""
    origins = {record.made_by for record in table.unit_records() if record.made_by is not None}
    return [json.loads(origin) for origin in sorted(origins)]
