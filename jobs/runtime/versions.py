"""Versions of the packages that results depend on."""

import importlib.metadata
from contextlib import suppress

_PACKAGES = (
    "snapfusion-ray",
    "ray",
    "torch",
    "diffusers",
    "transformers",
    "deltalake",
    "executorch",
    "torchao",
    "coremltools",
    "onnx",
    "onnxruntime",
)


def versions() -> dict[str, str]:
    """Versions by package name, of those that are installed: compilers for phones come with an extra."""
    found = {}
    for name in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
