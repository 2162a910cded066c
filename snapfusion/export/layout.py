"""Names in a mobile bundle that a reader of its manifest needs; importable without torch."""

FORMAT_VERSION = 2
RENOISING_VERSION = 3
"""Of bundles whose sampler adds noise at each step: a reader of version 2 alone would draw other images."""
FORMAT_VERSIONS = (FORMAT_VERSION, RENOISING_VERSION)
MANIFEST, IMAGES = "manifest.json", "pictures"
