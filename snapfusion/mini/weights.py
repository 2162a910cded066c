"""Where the bundled weights lie, and the manifest that says what they are."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

WEIGHTS = Path(__file__).parent / "weights"
"""Holds sd/ (a diffusers folder), scorer/, oracle/, manifest.json and MODEL_CARD.md."""

MANIFEST = "manifest.json"


def write_manifest(folder: Path, *, recipe: dict[str, Any], curves: dict[str, Any]) -> None:
    """Write the size and SHA-256 of each file below `folder`, the recipe and the loss curves."""
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (MANIFEST, "MODEL_CARD.md")
    }
    told = {"files": files, "recipe": recipe, "curves": curves}
    (folder / MANIFEST).write_text(json.dumps(told, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def read_manifest(folder: Path = WEIGHTS) -> dict[str, Any]:
    """What `write_manifest` wrote.

    Raises:
        ValueError: if `folder` has no manifest.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"there is no miniature in {folder}: it has no {MANIFEST}; give a folder of weights")
    manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return manifest


def altered_files(folder: Path = WEIGHTS) -> list[str]:
    """The files of the manifest that are missing below `folder` or whose content is another, sorted."""
    files = read_manifest(folder)["files"]
    return sorted(
        name
        for name, told in files.items()
        if not (folder / name).is_file() or _sha256(folder / name) != told["sha256"]
    )


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
