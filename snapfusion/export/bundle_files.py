"""The files of a mobile bundle, compared with its manifest; opens no program, and needs no torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from snapfusion.export.layout import FORMAT_VERSIONS, MANIFEST
from snapfusion.export.web_page import RUNTIME_FOLDER, RUNTIME_HASHES, read_hashes
from snapfusion.models.checksums import ChecksumError, compare_files, file_records
from snapfusion.records import RecordError, parse_record


class BundleError(ValueError):
    """A bundle that is missing, of another version, incomplete or altered; names the file."""


def verify_files(folder: Path) -> dict[str, Any]:
    """The manifest of a bundle, after every file was compared with it.

    onnxruntime-web may lie where the bundle's page looks for it, if its hashes are those that the page names.

    Raises:
        BundleError: if it is no bundle, of another version, a file is missing, altered or added, or one lies
            outside the folder.
    """
    manifest = _read_manifest(folder)
    _check_inside(folder, manifest)
    files = {name: record for name, record in file_records(folder).items() if name != MANIFEST}
    runtime = {name: files.pop(name) for name in list(files) if name.startswith(f"{RUNTIME_FOLDER}/")}
    try:
        compare_files(folder, expected=manifest["files"], actual=files, record="the manifest")
    except ChecksumError as error:
        raise BundleError(str(error)) from None
    if runtime:
        _check_runtime(folder, {name: record["sha256"] for name, record in runtime.items()})
    return manifest


def _check_runtime(folder: Path, found: Mapping[str, str]) -> None:
    path = folder / RUNTIME_HASHES
    expected = read_hashes(path.read_text()) if path.is_file() else {}
    for name, checksum in found.items():
        if expected.get(name.removeprefix(f"{RUNTIME_FOLDER}/")) != checksum:
            raise BundleError(f"{folder}: {name} is none of the files in {RUNTIME_HASHES}; remove it")


def _check_inside(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Refuse links and names that lead outside, to files that others may change after they were verified."""
    named = [
        folder / name
        for variant in manifest["variants"].values()
        for module in variant["modules"].values()
        for name in module["files"]
    ]
    links = [path for path in folder.rglob("*") if path.is_symlink()]
    for path in (*links, *named):
        if not path.resolve().is_relative_to(folder.resolve()):
            raise BundleError(
                f"{folder}: {path.relative_to(folder)} lies outside the bundle; copy it into it"
            )


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = parse_record((folder / MANIFEST).read_bytes(), name=str(folder / MANIFEST))
    except OSError:
        raise BundleError(f"{folder} has no {MANIFEST}: it is not a mobile bundle") from None
    except RecordError as error:
        raise BundleError(str(error)) from None
    version = manifest.get("format")
    if version not in FORMAT_VERSIONS:
        accepted = " and ".join(map(str, FORMAT_VERSIONS))
        raise BundleError(
            f"{folder} is a bundle of format {version}; formats {accepted} are accepted: compile "
            "it again, or use the release that made it"
        )
    return manifest
