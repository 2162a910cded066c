"""The files of a bundle's page: those of the bundle, and of onnxruntime-web, wherever it lies."""

from pathlib import Path

from jobs.runtime.logs import logger
from snapfusion.export.bundle_files import BundleError, verify_files
from snapfusion.export.layout import MANIFEST
from snapfusion.export.web_page import (
    PAGE_FOLDER,
    RUNTIME_FOLDER,
    RUNTIME_HASHES,
    is_pinned_runtime,
    read_hashes,
    runtime_version,
)
from snapfusion.settings import SettingsError

FRONT = f"{PAGE_FOLDER}/"
FETCHED = Path(__file__).parents[2] / ".web/onnxruntime-web"
"""Where `make web` puts onnxruntime-web, in a checkout."""


def page_files(bundle: Path, *, runtime: Path | None) -> dict[str, Path]:
    """Every file of a bundle, and of onnxruntime-web if there is one, by its name in the page's URLs.

    Args:
        bundle: folder of the bundle.
        runtime: folder of onnxruntime-web; None takes the bundle's, else that of `make web`.

    Raises:
        BundleError: if it is no bundle, its files are not those of its manifest, or it has no page.
        SettingsError: if `runtime` has no onnxruntime-web.
    """
    manifest = verify_files(bundle)
    if f"{PAGE_FOLDER}/index.html" not in manifest["files"]:
        raise BundleError(
            f"{bundle} has no page in {PAGE_FOLDER}/: compile it with ONNX models, as by --set "
            "'mobile.onnx=[\"float16\"]', into another folder"
        )
    files = {name: bundle / name for name in (MANIFEST, *manifest["files"])}
    folder = _runtime_folder(bundle, given=runtime)
    if folder is not None:
        files |= {f"{RUNTIME_FOLDER}/{path.name}": path for path in folder.iterdir() if path.is_file()}
    return files


def _runtime_folder(bundle: Path, *, given: Path | None) -> Path | None:
    """The folder of onnxruntime-web; says where it differs from the one that the page was made for."""
    text = (bundle / RUNTIME_HASHES).read_text()
    hashes, version = read_hashes(text), runtime_version(text)
    if given is not None:
        if missing := [name for name in hashes if not (given / name).is_file()]:
            raise SettingsError(
                f"--onnxruntime-web {given} has no {missing[0]}; the folder dist of the npm package "
                f"{version} is accepted"
            )
        if not is_pinned_runtime(given, hashes=hashes):
            logger.info(f"{given} is not {version}, with which this page was tested")
        return given
    for folder in (bundle / RUNTIME_FOLDER, FETCHED):
        if is_pinned_runtime(folder, hashes=hashes):
            return folder
    logger.info(
        f"{version} is not here, without which the page cannot draw: fetch it by `make web` in a checkout, "
        f"or give the folder dist of the npm package {version} as --onnxruntime-web"
    )
    return None
