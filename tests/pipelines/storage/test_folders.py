"""Folders appear whole: renamed into place on a disk, with a given file last in a store."""

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
