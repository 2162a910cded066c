"""Names in a mobile bundle that a reader of its manifest needs; importable without torch."""

FORMAT_VERSION = 2
MANIFEST, IMAGES = "manifest.json", "pictures"
