"""A file of weights is the one whose hash was named."""

import hashlib

import fsspec
import pytest

from snapfusion.metrics.pinned import PinnedFileError, file_hash, pinned_file

CONTENT = b"weights" * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def test_a_file_is_held_to_its_hash(tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(CONTENT)
    assert file_hash(path) == SHA256
    assert pinned_file(str(path)) == pinned_file(str(path), sha256=SHA256) == path
    path.write_bytes(CONTENT + b"!")
    with pytest.raises(PinnedFileError, match=f"{SHA256} was asked for"):
        pinned_file(str(path), sha256=SHA256)


def test_a_url_is_copied_once(tmp_path, monkeypatch):
    monkeypatch.setenv("SNAPFUSION_CACHE", str(tmp_path))
    fsspec.filesystem("memory").pipe_file("/models/weights.safetensors", CONTENT)
    path = pinned_file("memory://models/weights.safetensors", sha256=SHA256)
    fsspec.filesystem("memory").rm_file("/models/weights.safetensors")
    assert pinned_file("memory://models/weights.safetensors", sha256=SHA256) == path
    assert [entry.name for entry in path.parent.iterdir()] == ["weights.safetensors"]


def test_what_is_not_there_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("SNAPFUSION_CACHE", str(tmp_path))
    with pytest.raises(PinnedFileError, match=r"there is no file 'nowhere\.safetensors'"):
        pinned_file("nowhere.safetensors")
    with pytest.raises(PinnedFileError, match="cannot be read"):
        pinned_file("memory://models/missing.safetensors")
    with pytest.raises(PinnedFileError, match="neither a file here nor one that the hub gave"):
        pinned_file("owner/name/weights.safetensors")
