"""The checkpoint store: after kills, torn and altered files it finds the newest valid checkpoint."""

from pathlib import Path

import pytest
import torch
from damaged_files import flip_byte

from snapfusion.training.checkpoint import CheckpointError, CheckpointStore


def tensors(step):
    return {
        "model": {"weight": torch.full((3, 2), float(step)), "count": torch.tensor(step)},
        "optimizer": {"weight/step": torch.tensor(float(step))},
    }


def save(store, step):
    store.save(step, tensors=tensors(step), values={"step": step, "curve": [{"loss": 0.1}]})


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(str(tmp_path / "run" / "checkpoints"), keep=2)


@pytest.fixture
def files(tmp_path):
    return lambda step: tmp_path / "run" / "checkpoints" / f"step-{step:08d}"


def truncate(path):
    path.write_bytes(path.read_bytes()[:-5])


def test_saved_checkpoint_loads_bit_for_bit(store):
    save(store, 7)
    found = store.newest()
    assert (found.step, found.values) == (7, {"step": 7, "curve": [{"loss": 0.1}]})
    assert set(found.tensors) == {"model", "optimizer"}
    for group, named in tensors(7).items():
        for name, tensor in named.items():
            assert torch.equal(found.tensors[group][name], tensor)
            assert found.tensors[group][name].dtype == tensor.dtype


def test_loads_without_a_group(store):
    save(store, 7)
    assert set(store.load(7, only=("model", "ema")).tensors) == {"model"}


def test_empty_store_has_no_newest(store):
    assert store.newest() is None


@pytest.mark.parametrize("damage", [flip_byte, truncate, Path.unlink])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "manifest.json"])
def test_damaged_newest_falls_back(store, files, damage, name):
    save(store, 1)
    save(store, 2)
    damage(files(2) / name)
    assert store.newest().step == 1
    with pytest.raises(CheckpointError, match=name):
        store.load(2)


def test_altered_manifest_fails(store, files):
    save(store, 1)
    manifest = files(1) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"loss": 0.1', '"loss": 0.2'))
    with pytest.raises(CheckpointError, match="was altered"):
        store.load(1)


def test_keeps_the_newest_and_removes_torn_folders(store, files):
    for step in (1, 2, 3):
        save(store, step)
    (files(3) / "manifest.json").unlink()
    save(store, 4)
    assert sorted(files(0).parent.iterdir()) == [files(step) for step in (2, 3, 4)]
    save(store, 5)
    assert sorted(files(0).parent.iterdir()) == [files(step) for step in (4, 5)]


@pytest.mark.parametrize("damage", [flip_byte, truncate, Path.unlink])
def test_save_after_damage_keeps_a_checkpoint(tmp_path, files, damage):
    store = CheckpointStore(str(tmp_path / "run" / "checkpoints"), keep=1)
    save(store, 3)
    damage(files(3) / "model.safetensors")
    assert store.newest() is None
    save(store, 2)  # the run started over
    assert store.newest().step == 2
    assert not files(3).exists()


def test_save_killed_before_its_manifest(store, monkeypatch):
    save(store, 1)
    monkeypatch.setattr(store._fs, "pipe_file", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save(store, 2)
    assert store.newest().step == 1
    monkeypatch.undo()
    save(store, 2)
    assert store.newest().step == 2


def test_saving_a_step_again_replaces_it(store, files):
    save(store, 1)
    flip_byte(files(1) / "model.safetensors")
    save(store, 1)
    assert store.newest().step == 1


def test_short_write_keeps_the_older_checkpoint(tmp_path, monkeypatch):
    store = CheckpointStore(str(tmp_path), keep=1)
    save(store, 1)
    put_file = store._fs.put_file

    def put_half(local, path):
        put_file(local, path)
        store._fs.pipe_file(path, store._fs.cat_file(path)[:9])

    monkeypatch.setattr(store._fs, "put_file", put_half)
    with pytest.raises(CheckpointError, match="is incomplete"):
        save(store, 2)
    assert store.newest().step == 1


def test_object_store_url():
    store = CheckpointStore("memory://bucket/run/checkpoints", keep=1)
    save(store, 1)
    save(store, 2)
    assert store.newest().step == 2
    with pytest.raises(CheckpointError):
        store.load(1)
    store.delete()
    assert store.newest() is None


def test_keeping_none_fails(tmp_path):
    with pytest.raises(ValueError, match="keep is 0"):
        CheckpointStore(str(tmp_path), keep=0)
