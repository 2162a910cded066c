"""The bundled weights and their manifest."""

import json
from pathlib import Path
from typing import Any

from snapfusion.models.checksums import file_records
from snapfusion.records import parse_record

WEIGHTS = Path(__file__).parent / "weights"
"""Contains sd/ and sd-v/ (diffusers folders), scorer/, oracle/, manifest.json and MODEL_CARD.md."""

MANIFEST = "manifest.json"


def write_manifest(folder: Path, *, recipe: dict[str, Any], curves: dict[str, Any]) -> None:
    """Write the size and SHA-256 of each file below `folder`, the recipe and the loss curves."""
    own = (MANIFEST, "MODEL_CARD.md")
    files = {name: record for name, record in file_records(folder).items() if name not in own}
    manifest = {"files": files, "recipe": recipe, "curves": curves}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def read_manifest(folder: Path = WEIGHTS) -> dict[str, Any]:
    """Read the manifest of a folder of weights.

    Raises:
        ValueError: if `folder` has no manifest.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"there is no miniature in {folder}: it has no {MANIFEST}; give a folder of weights")
    return parse_record(path.read_bytes(), name=str(path))
