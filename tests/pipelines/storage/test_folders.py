"""Folders appear whole: renamed into place on a disk, with a given file last in a store."""

import signal
import subprocess
import sys

import fsspec
import pytest

from pipelines.storage.folders import publish_folder
from pipelines.storage.objects import StorageError


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "made"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.bin", "manifest.json", "sub/z.bin"):
        (folder / name).write_text(name)
    return folder


def test_folder_is_published_alone(folder, tmp_path):
    publish_folder(folder, str(tmp_path / "out" / "bundle"), last="manifest.json")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["bundle"]
    assert (tmp_path / "out" / "bundle" / "sub" / "z.bin").read_text() == "sub/z.bin"


def test_existing_folder_is_left_alone(folder, tmp_path):
    target = tmp_path / "bundle"
    target.mkdir()
    (target / "mine").write_text("kept")
    with pytest.raises(StorageError, match="bundle cannot be written"):
        publish_folder(folder, str(target), last="manifest.json")
    assert [path.name for path in target.iterdir()] == ["mine"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "made"]


def test_store_gets_the_named_file_last(folder, monkeypatch):
    store = fsspec.filesystem("memory")
    written, pipe_file = [], type(store).pipe_file

    def recording(self, path, data, **options):
        written.append(path.rsplit("/published/", 1)[-1])
        return pipe_file(self, path, data, **options)

    monkeypatch.setattr(type(store), "pipe_file", recording)
    publish_folder(folder, "memory://published", last="manifest.json")
    assert written == ["a.bin", "sub/z.bin", "manifest.json"]
    with pytest.raises(StorageError, match="exists already"):
        publish_folder(folder, "memory://published", last="manifest.json")
    store.rm("/published", recursive=True)


KILLED = """
import os, shutil, signal, sys
from pathlib import Path
from pipelines.storage.folders import publish_folder

def copy_a_part(folder, partial, **_):
    shutil.copy(folder / "a.bin", partial)
    if sys.argv[3] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    print("copied", flush=True)
    sys.stdin.read()

shutil.copytree = copy_a_part
publish_folder(Path(sys.argv[1]), sys.argv[2], last="manifest.json")
"""


def test_remains_of_a_killed_writer_are_removed(folder, tmp_path):
    target = tmp_path / "out" / "bundle"
    command = [sys.executable, "-c", KILLED, str(folder), str(target)]
    assert subprocess.run([*command, "killed"], check=False).returncode == -signal.SIGKILL
    [dead] = target.parent.iterdir()
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([*command, "living"], **pipes) as living:
        living.stdout.readline()
        [partial] = target.parent.iterdir()
        assert partial != dead
        publish_folder(folder, str(target), last="manifest.json")
        assert sorted(path.name for path in target.parent.iterdir()) == [partial.name, "bundle"]
        living.kill()


def test_remains_in_a_store_are_removed(folder):
    store = fsspec.filesystem("memory")
    for name in ("a.bin", "logs/events.of-a-killed-run"):
        store.pipe_file(f"/published/{name}", b"old")
    publish_folder(folder, "memory://published", last="manifest.json")
    assert sorted(store.find("/published")) == [
        f"/published/{name}" for name in ("a.bin", "manifest.json", "sub/z.bin")
    ]
    assert store.cat_file("/published/a.bin") == b"a.bin"
    store.rm("/published", recursive=True)
