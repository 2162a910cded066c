"""The checkpoint store: killed, torn and altered, it still finds the newest checkpoint that is good."""

import pytest
import torch

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


def flip_byte(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-5])


def remove(path):
    path.unlink()


def test_reads_back_what_was_saved_bit_for_bit(store):
    save(store, 7)
    found = store.newest()
    assert (found.step, found.values) == (7, {"step": 7, "curve": [{"loss": 0.1}]})
    assert set(found.tensors) == {"model", "optimizer"}
    for group, named in tensors(7).items():
        for name, tensor in named.items():
            assert torch.equal(found.tensors[group][name], tensor)
            assert found.tensors[group][name].dtype == tensor.dtype


def test_leaves_out_what_is_not_wanted(store):
    save(store, 7)
    assert set(store.load(7, without=("optimizer",)).tensors) == {"model"}


def test_is_empty_where_nothing_was_saved(store):
    assert store.newest() is None


@pytest.mark.parametrize("damage", [flip_byte, truncate, remove])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "manifest.json"])
def test_falls_back_when_the_newest_is_torn_or_altered(store, files, damage, name):
    save(store, 1)
    save(store, 2)
    damage(files(2) / name)
    assert store.newest().step == 1
    with pytest.raises(CheckpointError, match=name):
        store.load(2)


def test_altered_value_in_the_manifest_is_noticed(store, files):
    save(store, 1)
    manifest = files(1) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"loss": 0.1', '"loss": 0.2'))
    with pytest.raises(CheckpointError, match="was altered"):
        store.load(1)


def test_keeps_the_newest_and_collects_torn_folders(store, files):
    for step in (1, 2, 3):
        save(store, step)
    remove(files(3) / "manifest.json")
    save(store, 4)
    assert sorted(path.name for path in files(0).parent.iterdir()) == [
        f"step-{step:08d}" for step in (2, 3, 4)
    ]
    save(store, 5)
    assert sorted(path.name for path in files(0).parent.iterdir()) == [f"step-{step:08d}" for step in (4, 5)]


@pytest.mark.parametrize("damage", [flip_byte, truncate, remove])
def test_never_deletes_the_only_good_one(tmp_path, files, damage):
    store = CheckpointStore(str(tmp_path / "run" / "checkpoints"), keep=1)
    save(store, 3)
    damage(files(3) / "model.safetensors")
    assert store.newest() is None
    save(store, 2)  # the run began anew, and has not come as far as it was
    assert store.newest().step == 2
    assert not files(3).exists()


def test_a_save_that_is_killed_before_its_manifest_changes_nothing(store, monkeypatch):
    save(store, 1)
    monkeypatch.setattr(store._fs, "pipe_file", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save(store, 2)
    assert store.newest().step == 1
    monkeypatch.undo()
    save(store, 2)
    assert store.newest().step == 2


def test_saving_the_same_step_again_replaces_it(store, files):
    save(store, 1)
    flip_byte(files(1) / "model.safetensors")
    save(store, 1)
    assert store.newest().step == 1


def test_a_short_write_is_noticed_and_costs_no_older_checkpoint(tmp_path, monkeypatch):
    store = CheckpointStore(str(tmp_path), keep=1)
    save(store, 1)
    put_file = store._fs.put_file

    def put_half(local, path):
        put_file(local, path)
        store._fs.pipe_file(path, store._fs.cat_file(path)[:9])

    monkeypatch.setattr(store._fs, "put_file", put_half)
    with pytest.raises(CheckpointError, match="did not arrive whole"):
        save(store, 2)
    assert store.newest().step == 1


def test_works_on_an_object_store_url():
    store = CheckpointStore("memory://bucket/run/checkpoints", keep=1)
    save(store, 1)
    save(store, 2)
    assert store.newest().step == 2
    with pytest.raises(CheckpointError):
        store.load(1)
    store.delete()
    assert store.newest() is None


def test_refuses_to_keep_none(tmp_path):
    with pytest.raises(ValueError, match="keep is 0"):
        CheckpointStore(str(tmp_path), keep=0)
