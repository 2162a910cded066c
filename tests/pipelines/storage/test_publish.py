"""Folders appear whole: at once on a disk, the named file last in a store."""

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


def test_a_folder_moves_into_place_and_leaves_nothing_beside_it(folder, tmp_path):
    publish_folder(folder, str(tmp_path / "out" / "bundle"), last="manifest.json")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["bundle"]
    assert (tmp_path / "out" / "bundle" / "sub" / "z.bin").read_text() == "sub/z.bin"


def test_a_taken_place_is_left_as_it_is(folder, tmp_path):
    target = tmp_path / "bundle"
    target.mkdir()
    (target / "mine").write_text("kept")
    with pytest.raises(StorageError, match="bundle cannot be written"):
        publish_folder(folder, str(target), last="manifest.json")
    assert [path.name for path in target.iterdir()] == ["mine"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "made"]


def test_a_store_gets_the_named_file_last(folder, monkeypatch):
    store = fsspec.filesystem("memory")
    put = []
    original = store.pipe_file

    def record(path, data, **options):
        put.append(path.rsplit("/published/", 1)[-1])
        return original(path, data, **options)

    monkeypatch.setattr(
        type(store), "pipe_file", lambda self, path, data, **options: record(path, data, **options)
    )
    publish_folder(folder, "memory://published", last="manifest.json")
    assert put == ["a.bin", "sub/z.bin", "manifest.json"]
    with pytest.raises(StorageError, match="there already"):
        publish_folder(folder, "memory://published", last="manifest.json")
    store.rm("/published", recursive=True)
