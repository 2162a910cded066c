"""Objects that are written piece by piece appear whole, or not at all."""

import hashlib
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest

from pipelines.storage.objects import StorageError
from pipelines.storage.streams import write_stream

KILLED = """
import os, signal, sys
from pipelines.storage.streams import write_stream
with write_stream(sys.argv[1]) as file:
    file.write(b"x" * 100_000)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_an_object_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "folder/object"
    with write_stream(str(path)) as file:
        file.write(b"one ")
        assert not path.exists()
        file.write(b"two")
    assert path.read_bytes() == b"one two"
    assert (file.size, file.sha256()) == (7, hashlib.sha256(b"one two").hexdigest())
    assert names_in(path.parent) == ["object"]


def test_an_error_keeps_the_earlier_object(tmp_path):
    path = tmp_path / "object"
    path.write_bytes(b"earlier")

    def write_half() -> None:
        with write_stream(str(path)) as file:
            file.write(b"later")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_half()
    assert path.read_bytes() == b"earlier"
    assert names_in(tmp_path) == ["object"]


def test_what_a_killed_writer_left_is_removed(tmp_path):
    path = tmp_path / "object"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    assert killed.returncode == -9
    [partial] = names_in(tmp_path)
    assert partial.startswith(".object.")
    with write_stream(str(path)) as file:
        file.write(b"whole")
        with write_stream(str(path)) as other:  # another process at work keeps its file
            other.write(b"other")
    assert path.read_bytes() == b"whole"
    assert names_in(tmp_path) == ["object"]


def test_a_remote_object_is_uploaded_whole():
    with write_stream("memory://bucket/object") as file:
        file.write(b"bytes")
    assert fsspec.filesystem("memory").cat_file("/bucket/object") == b"bytes"


def test_a_folder_that_cannot_be_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with (
        pytest.raises(StorageError, match=r"file/object cannot be written"),
        write_stream(str(tmp_path / "file/object")),
    ):
        pass
