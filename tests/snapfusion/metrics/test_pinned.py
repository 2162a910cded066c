"""Files of weights are found and checked against their hash."""

import hashlib

import fsspec
import pytest

from snapfusion.metrics.pinned import PinnedFileError, pinned_file

CONTENT = b"weights" * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def test_a_file_is_checked_against_its_hash(tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(CONTENT)
    assert pinned_file(str(path)) == pinned_file(str(path), sha256=SHA256) == path
    path.write_bytes(CONTENT + b"!")
    with pytest.raises(PinnedFileError, match=f"{SHA256} is expected"):
        pinned_file(str(path), sha256=SHA256)


def test_a_url_is_copied_once(tmp_path, monkeypatch):
    monkeypatch.setenv("SNAPFUSION_CACHE", str(tmp_path))
    fsspec.filesystem("memory").pipe_file("/models/weights.safetensors", CONTENT)
    path = pinned_file("memory://models/weights.safetensors", sha256=SHA256)
    fsspec.filesystem("memory").rm_file("/models/weights.safetensors")
    assert pinned_file("memory://models/weights.safetensors", sha256=SHA256) == path
    assert [entry.name for entry in path.parent.iterdir()] == ["weights.safetensors"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.safetensors", r"there is no file 'nowhere\.safetensors'"),
        ("memory://models/missing.safetensors", "cannot be read"),
        ("owner/name/weights.safetensors", "neither a local file nor available from the hub"),
    ],
)
def test_missing_files_are_refused(tmp_path, monkeypatch, source, message):
    monkeypatch.setenv("SNAPFUSION_CACHE", str(tmp_path))
    with pytest.raises(PinnedFileError, match=message):
        pinned_file(source)
