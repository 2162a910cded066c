"""Keeps the parts of a report that a model computes, under a hash of everything that they follow from.

OUT/report/cache/NAME.json    the hash, the part, and a checksum of it
"""

import base64
import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import fsspec
import numpy as np
from pydantic import PlainSerializer, PlainValidator, TypeAdapter

from jobs.runtime.logs import logger
from jobs.runtime.versions import versions
from pipelines.storage.objects import exists, list_names, read_bytes, replace_object
from pipelines.tables.schemas import from_png, to_png
from snapfusion.settings import digest

PartT = TypeVar("PartT")

_ROOT = Path(__file__).parents[2]
_CODE = ("jobs/evaluation", "jobs/reports", "pipelines", "snapfusion")
_BUNDLED_NETWORKS = "snapfusion/mini/weights/manifest.json"
"""Names the SHA-256 of the miniature's networks, which score images."""


def _decoded(value: Any) -> np.ndarray:  # noqa: ANN401 - pixels, or the text of a PNG
    return value if isinstance(value, np.ndarray) else from_png(base64.b64decode(value, validate=True))


Pixels = Annotated[
    np.ndarray,
    PlainValidator(_decoded),
    PlainSerializer(lambda image: base64.b64encode(to_png(image)).decode(), return_type=str),
]
"""uint8 [H,W,3], in JSON a PNG."""


class DamagedPartError(ValueError):
    """A file that does not hold what was written; says why."""


class PartCache:
    """The kept parts of one report.

    A part that follows from something else by now, or whose file is damaged, is computed again and replaces
    the file: nothing that a deletion request removed from a table stays in an old file.

    Args:
        url: of the folder.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._names: set[str] = set()

    def part(
        self, name: str, form: TypeAdapter[PartT], *, follows_from: object, compute: Callable[[], PartT]
    ) -> PartT:
        """The kept part, or what `compute` returns, which is kept then.

        Args:
            name: of the part.
            form: of its JSON values.
            follows_from: JSON values; everything that determines the part but the code.
            compute: imports the heavy libraries that it needs.
        """
        self._names.add(name)
        key = digest({"of": follows_from, "code": code_digest(*_CODE), "versions": versions()})
        url = f"{self._url}/{name}.json"
        if exists(url):
            try:
                record = _parse(read_bytes(url))
                if record["key"] == key:
                    return form.validate_python(record["part"])
            except ValueError as error:  # also pydantic's own
                reason = str(error).splitlines()[0]
                logger.info(f"  {url} is damaged ({reason}); its part of the report is computed again")
        values = json.loads(form.dump_json(compute()))
        record = {"key": key, "sha256": digest(values), "part": values}
        replace_object(url, json.dumps(record).encode())
        # Read back, so that the first report and the second render equal values.
        return form.validate_python(values)

    def remove_others(self) -> None:
        """Remove the parts that this report does not have: they may show rows that were deleted since."""
        filesystem, folder = fsspec.core.url_to_fs(self._url)
        for file in list_names(self._url):
            if file.removesuffix(".json") not in self._names:
                filesystem.rm_file(f"{folder}/{file}")


def _parse(data: bytes) -> dict[str, Any]:
    record = json.loads(data)
    if not isinstance(record, dict) or record.keys() != {"key", "sha256", "part"}:
        raise DamagedPartError("it is no part of a report")
    if digest(record["part"]) != record["sha256"]:
        raise DamagedPartError("its checksum differs")
    return record


@functools.cache
def code_digest(*folders: str) -> str:
    """SHA-256 of the code in folders of this repository, and of the list of bundled networks."""
    files = [path for folder in folders for path in (_ROOT / folder).rglob("*.py")]
    sha = hashlib.sha256()
    for path in (*sorted(files), _ROOT / _BUNDLED_NETWORKS):
        sha.update(f"{path.relative_to(_ROOT)}\n".encode() + path.read_bytes())
    return sha.hexdigest()
