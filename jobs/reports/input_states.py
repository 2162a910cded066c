"""Identifies models, files and tables by what changes when their content does, without reading weights."""

from typing import Any

import fsspec

from pipelines.storage.objects import exists, read_bytes
from pipelines.tables.table import Snapshot
from snapfusion.models.bundled import BUNDLED
from snapfusion.models.checksums import CHECKSUMS_FILE
from snapfusion.models.source import source_paths
from snapfusion.settings import digest

_MODEL_FOLDERS = ("", "/model")
"""Where the source of a model may have it: it is a diffusers folder, or a run folder."""

_CHANGING = ("size", "mtime", "ETag", "etag", "md5Hash", "LastModified", "last_modified")
"""Fields of a file's listing that change with its content; each kind of store has its own."""


def model_state(source: str) -> dict[str, Any]:
    """The state of a model: its list of checksums, or of its files if it has none.

    A hub id has no files of its own here and stands for itself.
    """
    path, *files = source_paths(source)
    root = str(BUNDLED.get(path, path))
    options = {"source": source, "merged": [files_state(file) for file in files]} if path != source else {}
    for folder in _MODEL_FOLDERS:
        if exists(f"{root}{folder}/{CHECKSUMS_FILE}"):
            return {"checksums": digest(read_bytes(f"{root}{folder}/{CHECKSUMS_FILE}").decode()), **options}
    return {"source": source, "files": files_state(root), **options}


def files_state(url: str) -> list[list[str]]:
    """Each file at or below a URL, by its path below it, with what changes when its content does."""
    filesystem, root = fsspec.core.url_to_fs(url)
    found = filesystem.find(root, detail=True)
    return [
        [path.removeprefix(root), *(str(info[field]) for field in _CHANGING if info.get(field))]
        for path, info in sorted(found.items())
    ]


def table_state(table: Snapshot) -> dict[str, Any]:
    """The state of a table: its identity, version and units."""
    return {
        "identity": digest(table.identity),
        "version": table.version,
        "units": [[unit.unit, unit.rows, unit.size] for unit in table.units],
    }
