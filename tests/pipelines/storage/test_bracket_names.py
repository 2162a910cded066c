"""Names with square brackets, on a disk and on S3: every call on a store names one object."""

from pathlib import Path

import fsspec
import pytest
import torch

from pipelines.download.receipts import read_receipts, remove_staging
from pipelines.storage.objects import exists, move_object, read_bytes, write_once
from snapfusion.models.load import load
from snapfusion.models.save import save
from snapfusion.records import RecordError
from snapfusion.training.checkpoint import CheckpointStore


@pytest.fixture(params=["disk", "s3"])
def store(request, tmp_path) -> str:
    """URL of an empty folder."""
    return (
        str(tmp_path) if request.param == "disk" else f"{request.getfixturevalue('bucket')}/{tmp_path.name}"
    )


def files(url: str) -> set[str]:
    filesystem, root = fsspec.core.url_to_fs(url)
    filesystem.invalidate_cache()
    return {path.removeprefix(root) for path in filesystem.find(root)}


def saved(store: CheckpointStore, step: int) -> None:
    store.save(step, tensors={"model": {"weight": torch.full((2,), float(step))}}, values={})


def test_deleting_checkpoints_leaves_those_of_a_similar_name(store):
    named, similar = CheckpointStore(f"{store}/run[1]", keep=1), CheckpointStore(f"{store}/run1", keep=1)
    for each in (named, similar):
        saved(each, 1)
    before = files(f"{store}/run1")
    saved(named, 2)
    assert named.newest().step == 2
    assert {name.split("/")[1] for name in files(f"{store}/run[1]")} == {"step-00000002"}, "pruned"
    named.delete()
    assert files(f"{store}/run[1]") == set()
    assert files(f"{store}/run1") == before


def test_a_model_is_loaded_by_its_literal_name(store, tiny_teacher, tmp_path, monkeypatch):
    monkeypatch.setenv("SNAPFUSION_CACHE", str(tmp_path / "cache"))
    other = load(tiny_teacher)
    with torch.no_grad():
        other.unet.conv_out.bias.add_(1.0)
    save(other, tmp_path / "other")
    for source, name in ((tiny_teacher, "m[1]"), (str(tmp_path / "other"), "m1")):
        for path in Path(source).rglob("*"):
            if path.is_file():
                write_once(f"{store}/{name}/{path.relative_to(source)}", path.read_bytes())
    assert load(f"{store}/m[1]").fingerprint() == load(tiny_teacher).fingerprint()
    assert load(f"{store}/m1").fingerprint() == load(str(tmp_path / "other")).fingerprint()


def test_objects_move_to_their_literal_name(store):
    for name in ("a[1].tar", "a1.tar"):
        write_once(f"{store}/{name}", name.encode())
    move_object(f"{store}/a[1].tar", f"{store}/b[1].tar")
    assert files(store) >= {"/a1.tar", "/b[1].tar"}
    assert not exists(f"{store}/a[1].tar")
    assert read_bytes(f"{store}/b[1].tar") == b"a[1].tar"


def test_staging_is_removed_and_receipts_are_found(store):
    for folder in ("d[1]", "d1"):
        write_once(f"{store}/{folder}/_staging/00000.tar", b"half")
        write_once(f"{store}/{folder}/_receipts/00000.json", b"{}")
    remove_staging(f"{store}/d[1]")
    assert files(f"{store}/d[1]") == {"/_receipts/00000.json"}
    assert "/_staging/00000.tar" in files(f"{store}/d1")
    with pytest.raises(RecordError, match=r"d\[1\]/_receipts/00000\.json is no receipt"):
        read_receipts(f"{store}/d[1]")  # it is found, and holds no receipt
