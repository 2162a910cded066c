"""The page that draws from a caption in a browser, by the ONNX models of a bundle. Its sources are in `web/`.

The page needs onnxruntime-web, which is no part of a bundle: `web/onnxruntime-web.sha256` has its version and
the hashes of its files.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path

PAGE_FOLDER = "web"
RUNTIME_FOLDER = "web/onnxruntime-web"
"""Where the page looks for onnxruntime-web."""
RUNTIME_HASHES = "web/onnxruntime-web.sha256"

PAGE_SOURCE = Path(__file__).with_name("web")
"""Folder of the page's sources."""


def write_page(folder: Path) -> None:
    """Copy the page into the folder of a bundle."""
    shutil.copytree(PAGE_SOURCE, folder / PAGE_FOLDER)


def read_hashes(text: str) -> dict[str, str]:
    """SHA-256 by name, of a file for `sha256sum --check`."""
    lines = [line.split() for line in text.splitlines() if not line.startswith("#")]
    return {name: checksum for checksum, name in lines}


def runtime_version(text: str) -> str:
    """The version of onnxruntime-web in the first line of its file of hashes."""
    return text.partition("\n")[0].removeprefix("# ")


def is_pinned_runtime(folder: Path, *, hashes: Mapping[str, str]) -> bool:
    """Whether a folder has every file of onnxruntime-web with its hash."""
    from snapfusion.models.checksums import file_hash

    return all(
        (folder / name).is_file() and file_hash(folder / name) == checksum
        for name, checksum in hashes.items()
    )
