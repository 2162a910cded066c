"""Files of weights are found and checked against their hash."""

import hashlib
import re
import sys
from pathlib import Path

import fsspec
import pytest
import torch
from safetensors.torch import load_file

from snapfusion.metrics.pinned import PinnedFileError, hash_of, missing_reason, pinned_file

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


def test_what_is_missing_is_found_without_fetching(tmp_path):
    path = tmp_path / "weights.safetensors"
    assert "there is no file" in missing_reason(str(path))
    path.touch()
    assert missing_reason(str(path)) is None
    assert missing_reason("owner/name/weights.safetensors") is None  # the hub is not asked


def test_a_file_is_hashed_again_when_it_changes(tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(CONTENT)
    assert hash_of(path) == hash_of(path) == SHA256
    path.write_bytes(CONTENT + b"!")
    assert hash_of(path) == hashlib.sha256(CONTENT + b"!").hexdigest()


def test_the_documented_conversion_makes_safetensors(tmp_path, monkeypatch):
    document = (Path(__file__).parents[3] / "docs" / "evaluation.md").read_text()
    (script,) = re.findall(r'^python -c "(.+?)^" HPS', document, re.DOTALL | re.MULTILINE)
    weight = torch.arange(6.0).view(2, 3).T
    for name, content in (("nested", {"epoch": 1, "state_dict": {"w": weight}}), ("plain", {"w": weight})):
        pickled, converted = tmp_path / f"{name}.pt", tmp_path / f"{name}.safetensors"
        torch.save(content, pickled)
        monkeypatch.setattr(sys, "argv", ["-c", str(pickled), str(converted)])
        exec(script, {})
        assert torch.equal(load_file(converted)["w"], weight)
