"""The environment of img2dataset: pinned as a whole, made by one script, and what the document says of it."""

import re
import subprocess
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

from pipelines.download.settings import FetchSettings
from pipelines.fetching.causes import PERMANENT, TRANSIENT

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "infra/img2dataset"
DOCUMENT = (ROOT / "docs/downloading.md").read_text()


def pins():
    lines = (FOLDER / "requirements.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_every_package_is_pinned_and_no_index_is_named():
    assert pins()["img2dataset"] == "1.47.0"
    for file in FOLDER.iterdir():
        assert not re.search(r"https?://|index-url|find-links", file.read_text()), file


def test_the_script_is_executable_and_stops_at_the_first_error():
    script = FOLDER / "setup.sh"
    assert script.stat().st_mode & 0o111
    assert "set -euo pipefail" in script.read_text()


@pytest.mark.skipif(not (ROOT / FetchSettings().python).exists(), reason="not installed: `make downloader`")
def test_what_is_installed_is_what_is_pinned_and_lacks_only_what_is_said():
    pip = [ROOT / ".venv-img2dataset/bin/python", "-m", "pip", "--disable-pip-version-check"]
    listed = subprocess.run([*pip, "freeze"], capture_output=True, text=True, check=True).stdout.split()
    installed = {canonicalize_name(name): version for name, version in (line.split("==") for line in listed)}
    assert installed == {canonicalize_name(name): version for name, version in pins().items()}
    missing = subprocess.run([*pip, "check"], check=False, capture_output=True, text=True).stdout
    assert set(re.findall(r"requires (\S+), which is not installed", missing)) == {"dataclasses", "wandb"}
    assert not re.search(r"has requirement", missing)


def test_the_image_makes_it_where_the_document_says():
    place = "/home/ray/img2dataset"
    assert f"RUN infra/img2dataset/setup.sh {place}\n" in (ROOT / "infra/Dockerfile").read_text()
    assert f"download.fetching.python={place}/bin/python" in DOCUMENT


def test_the_document_names_every_cause_and_whether_it_may_pass():
    (row,) = (line for line in DOCUMENT.splitlines() if line.startswith("| `timed_out`"))
    transient, permanent = (set(re.findall(r"`(\w+)`", cell)) for cell in row.strip("|").split("|"))
    assert (transient, permanent) == (set(TRANSIENT), set(PERMANENT))


def test_the_document_states_the_bounds_as_they_are():
    limits = FetchSettings().limits
    assert f"last byte\n  ({limits.seconds:g}), bytes of a picture ({limits.max_bytes >> 20} MiB)" in DOCUMENT
    assert limits.max_pixels == 2**25
    assert "(2^25)" in DOCUMENT
    assert f"to decode it ({limits.decode_seconds:g})" in DOCUMENT
    assert limits.max_redirects == 5
    assert 2 * FetchSettings().threads * limits.max_bytes == 2 << 30
