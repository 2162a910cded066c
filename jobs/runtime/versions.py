"""The software that a result was made with."""

from __future__ import annotations

import importlib.metadata

_NAMES = (
    "snapfusion-ray",
    "ray",
    "torch",
    "diffusers",
    "transformers",
    "deltalake",
    "executorch",
    "torchao",
    "coremltools",
)


def versions() -> dict[str, str]:
    """The version of each package that results depend on, by name."""
    return {name: importlib.metadata.version(name) for name in _NAMES}
