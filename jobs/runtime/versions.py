"""Versions of the packages that results depend on."""

import importlib.metadata

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
)


def versions() -> dict[str, str]:
    """Versions by package name."""
    return {name: importlib.metadata.version(name) for name in _PACKAGES}
