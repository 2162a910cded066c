"""The environment of img2dataset is pinned, and docs/downloading.md agrees with it."""

import re
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pipelines.download.settings import FetchSettings
from pipelines.fetching.causes import PERMANENT, TRANSIENT

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "infra/img2dataset"
DOCUMENT = (ROOT / "docs/downloading.md").read_text()
TEXT = " ".join(DOCUMENT.split())


def pins(python=None):
    """Versions by name; those of a Python such as 3.13, or those of this one."""
    lines = (FOLDER / "requirements.txt").read_text().splitlines()
    listed = [Requirement(line) for line in lines if line and not line.startswith("#")]
    environment = {"python_version": python} if python else None
    return {
        one.name: str(one.specifier).removeprefix("==")
        for one in listed
        if one.marker is None or one.marker.evaluate(environment)
    }


def test_every_package_is_pinned():
    assert pins()["img2dataset"] == "1.47.0"
    for file in FOLDER.iterdir():
        assert not re.search(r"https?://|index-url|find-links", file.read_text()), file


def test_imghdr_is_added_where_python_lacks_it():
    assert "standard-imghdr" not in pins("3.12")
    assert "standard-imghdr" in pins("3.13")


def test_the_script_stops_at_errors():
    script = FOLDER / "setup.sh"
    assert script.stat().st_mode & 0o111
    assert "set -euo pipefail" in script.read_text()


@pytest.mark.skipif(not (ROOT / FetchSettings().python).exists(), reason="not installed: `make downloader`")
def test_installed_packages_are_the_pinned_ones():
    # Isolated: the checkout on PYTHONPATH would be listed as a package.
    pip = [ROOT / ".venv-img2dataset/bin/python", "-I", "-m", "pip", "--disable-pip-version-check"]
    listed = subprocess.run([*pip, "freeze"], capture_output=True, text=True, check=True).stdout.split()
    (python,) = (path.name.removeprefix("python") for path in (ROOT / ".venv-img2dataset/lib").iterdir())
    installed = {canonicalize_name(name): version for name, version in (line.split("==") for line in listed)}
    assert installed == {canonicalize_name(name): version for name, version in pins(python).items()}
    missing = subprocess.run([*pip, "check"], check=False, capture_output=True, text=True).stdout
    assert set(re.findall(r"requires (\S+), which is not installed", missing)) == {"dataclasses", "wandb"}
    assert not re.search(r"has requirement", missing)


def test_image_and_document_name_one_folder():
    folder = "/home/ray/img2dataset"
    assert f"RUN infra/img2dataset/setup.sh {folder}\n" in (ROOT / "infra/Dockerfile").read_text()
    assert f"download.fetching.python={folder}/bin/python" in DOCUMENT


def test_the_document_names_every_cause():
    (row,) = (line for line in DOCUMENT.splitlines() if line.startswith("| `timed_out`"))
    transient, permanent = (set(re.findall(r"`(\w+)`", cell)) for cell in row.strip("|").split("|"))
    assert (transient, permanent) == (set(TRANSIENT), set(PERMANENT))


def test_the_document_states_the_bounds():
    limits = FetchSettings().limits
    for bound in (f"{limits.seconds:g}", f"{limits.max_bytes >> 20} MiB", f"{limits.decode_seconds:g}"):
        assert f"({bound})" in TEXT
    assert (limits.max_pixels, limits.max_redirects) == (2**25, 5)
    assert "(2^25)" in TEXT
    assert 2 * FetchSettings().threads * limits.max_bytes == 2 << 30
