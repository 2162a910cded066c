"""Exports as WebDataset: members as FastGen's and diffusers' loaders name them, in shards that resume."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_bundle
from deletion_run import TABLES, id_of, keys_of, url_of
from export_inputs import SETTINGS, export, files_in, samples_in, tensor
from in_process import in_process
from latent_inputs import first_units
from PIL import Image

from pipelines.deletion.rewrite import delete_rows
from pipelines.exports import webdataset
from pipelines.exports.shards import plan_shards
from pipelines.sources.stats import ShardStats
from pipelines.storage.objects import StorageError
from pipelines.tables.schemas import from_png, read_array
from pipelines.tables.table import TableError
from pipelines.tables.unit_files import UnitFile
from snapfusion.models.load import load
from snapfusion.models.save import save
from snapfusion.noise import gaussian

MEMBERS = {
    "latents": {"latent.pth", "txt_emb.pth", "txt", "json"},
    "pairs": {"latent.pth", "txt_emb.pth", "noise.pth", "png", "txt", "json"},
    "targets": {"latent.pth", "txt_emb.pth", "noise.pth", "x_target.pth", "json"},
}
"""Of each kind of table, by the names in FastGen's PairLoaderConfig and in diffusers' LCM script."""
DTYPES = {
    "latent.pth": torch.float16,
    "txt_emb.pth": torch.float16,
    "noise.pth": torch.float32,
    "x_target.pth": torch.float16,
}


@pytest.fixture(scope="module")
def exported(whole_run, tmp_path_factory) -> dict[str, Path]:
    """An export of each table."""
    folders = {name: tmp_path_factory.mktemp("exported") / name for name in TABLES}
    for name, folder in folders.items():
        export(whole_run, name, folder)
    return folders


@pytest.mark.parametrize("name", TABLES)
def test_each_row_is_one_complete_sample(whole_run, exported, name):
    rows, samples = whole_run.table(name).read(), samples_in(exported[name])
    assert [json.loads(sample["json"])["id"] for sample in samples] == rows["id"].to_pylist()
    assert len({sample["__key__"] for sample in samples}) == len(samples)
    for sample in samples:
        members = {member for member in sample if not member.startswith("__")}
        assert members == MEMBERS[name]
        shapes = {member: tuple(tensor(sample[member]).shape) for member in members & DTYPES.keys()}
        assert shapes == {member: (16, 16) if member == "txt_emb.pth" else (4, 8, 8) for member in shapes}
        assert {member: tensor(sample[member]).dtype for member in shapes} == {m: DTYPES[m] for m in shapes}


@pytest.mark.parametrize("name", TABLES)
def test_tensors_are_the_rows_and_their_noise(whole_run, exported, name):
    rows, bundle = whole_run.table(name).read(), load(whole_run.teacher)
    samples = samples_in(exported[name])
    for column in {"latent", "x_target"} & {*rows.schema.names}:
        values = np.stack([tensor(sample[f"{column}.pth"]).numpy() for sample in samples])
        assert np.array_equal(values, read_array(rows, column))
    ids = torch.from_numpy(read_array(rows, "token_ids").copy()).long()
    embeddings = torch.stack([tensor(sample["txt_emb.pth"]) for sample in samples]).float()
    assert torch.allclose(embeddings, bundle.encode_text(ids), atol=2e-3)
    if name != "latents":
        for key, sample in zip(rows["noise_key"].to_pylist(), samples, strict=True):
            assert torch.equal(tensor(sample["noise.pth"]), gaussian(key, (4, 8, 8)))


def test_captions_and_images_are_the_stored_ones(whole_run, exported):
    rows = whole_run.table("pairs").read().to_pylist()
    for row, sample in zip(rows, samples_in(exported["pairs"]), strict=True):
        assert sample["txt"].decode() == row["caption"]
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(sample["png"]))), from_png(row["image"]))
        values = json.loads(sample["json"])
        assert values["noise_key"] == row["noise_key"]
        assert [values[f"{part}{side}"] for part in ("", "original_") for side in ("width", "height")] == [
            16,
            16,
            16,
            16,
        ]


def test_guidance_of_targets_is_in_json(whole_run, exported):
    rows = whole_run.table("targets").read(["t", "t2", "k", "w"]).to_pylist()
    values = [json.loads(sample["json"]) for sample in samples_in(exported["targets"])]
    assert [{name: one[name] for name in ("t", "t2", "k", "w")} for one in values] == rows
    assert {one["w"] is None for one in values} == {True, False}


def test_the_empty_caption_lies_beside_shards(whole_run, exported):
    null = load(whole_run.teacher).null_condition()[0].half().numpy()
    assert np.array_equal(np.load(exported["pairs"] / "neg_prompt_emb.npy"), null)


def test_records_name_version_lineage_and_counts(whole_run, exported):
    table, folder = whole_run.table("targets"), exported["targets"]
    record = json.loads((folder / "export.json").read_text())
    assert record["table"] == table.lineage()
    assert (record["kind"], record["rows"], record["shards"]) == ("targets", 36, 8)
    counts = json.loads((folder / "shard_count.json").read_text())
    assert counts == {f"{number:05d}.tar": 5 if number < 7 else 1 for number in range(8)}
    assert ShardStats.read(str(folder / "00007.tar")) == ShardStats(count=1)


def test_shards_cover_all_rows_in_order():
    files = [UnitFile(unit=f"u{rows}", path="", rows=rows, size=0) for rows in (4, 0, 13, 1, 5)]
    plans = list(plan_shards(files, rows_per_shard=5))
    assert [plan.rows for plan in plans] == [5, 5, 5, 5, 3]
    covered = [
        (part.file.unit, row) for plan in plans for part in plan.parts for row in range(part.start, part.stop)
    ]
    assert covered == [(file.unit, row) for file in files for row in range(file.rows)]


@pytest.mark.parametrize("shards", [0, 1])
def test_a_stopped_export_resumes_to_equal_bytes(whole_run, exported, tmp_path, shards):
    folder = tmp_path / "export"
    with pytest.raises(StorageError):  # the counts of shards that are missing
        export(whole_run, "pairs", folder, runner=first_units(shards))
    (folder / "00003.tar").write_bytes(b"a tar without its counts")
    done = export(whole_run, "pairs", folder)
    assert (done.shards, done.written, done.samples) == (4, 3 - shards, 18)
    assert files_in(folder) == files_in(exported["pairs"])


def test_a_finished_export_is_left_alone(whole_run, exported):
    times = {path.name: path.stat().st_mtime_ns for path in exported["latents"].glob("0*")}
    assert export(whole_run, "latents", exported["latents"]).written == 0
    assert {path.name: path.stat().st_mtime_ns for path in exported["latents"].glob("0*")} == times


def test_an_error_leaves_no_partial_shard(whole_run, tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.exports.samples.gaussian", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(whole_run, "pairs", tmp_path / "export")
    assert sorted(path.name for path in (tmp_path / "export").iterdir()) == [
        "export.json",
        "neg_prompt_emb.npy",
    ]


def test_listed_rows_are_left_out(run, exported, tmp_path):
    run.list.add(keys_of(ids=[id_of(0, 1)]))
    done = export(run, "pairs", tmp_path / "export")
    assert (done.rows, done.samples) == (18, 17)
    left = {sample["__key__"]: sample for sample in samples_in(tmp_path / "export")}
    before = {sample["__key__"]: sample for sample in samples_in(exported["pairs"])}
    [gone] = before.keys() - left.keys()
    assert json.loads(before[gone]["json"])["source_id"] == id_of(0, 1)
    # The others have equal bytes, though the batch of captions has lost one.
    members = MEMBERS["pairs"]
    assert all(left[key][member] == before[key][member] for key in left for member in members)
    statistics = json.loads((tmp_path / "export/00000_stats.json").read_text())
    assert statistics["status_dict"] == {"success": 4, "forgotten": 1}


def test_an_export_with_deleted_rows_is_refused(run, tmp_path):
    with pytest.raises(StorageError):
        export(run, "pairs", tmp_path / "export", runner=first_units(1))
    run.list.add(keys_of(urls=[url_of(0, 1)], ids=[id_of(0, 1)]))
    delete_rows(run.urls, run.list.read())
    with pytest.raises(TableError, match="rows were deleted on request since; remove the folder"):
        export(run, "pairs", tmp_path / "export")
    assert export(run, "pairs", tmp_path / "anew").samples == 17


def test_the_first_version_stays_the_exported(run, tmp_path):
    with pytest.raises(StorageError):
        export(run, "pairs", tmp_path / "export", runner=first_units(1))
    first = run.table("pairs").version
    run.generate_pairs(draws=2)
    done = export(run, "pairs", tmp_path / "export")
    assert (done.version, done.samples) == (first, 18)
    assert export(run, "pairs", tmp_path / "anew").samples == 36


def other_model(folder: Path) -> str:
    """A model with other weights, and so another VAE and text encoder."""
    save(tiny_bundle(seed=1), folder)
    return str(folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [("pairs", "another model than .*text_encoder"), ("latents", "another VAE")],
)
def test_another_text_encoder_is_refused(whole_run, tmp_path, name, message):
    with pytest.raises(TableError, match=message):
        export(whole_run, name, tmp_path / "export", model=other_model(tmp_path / "other"))
    assert not (tmp_path / "export").exists()


def test_other_settings_or_table_are_refused(whole_run, exported, tmp_path):
    folder = shutil.copytree(exported["pairs"], tmp_path / "export")
    with pytest.raises(TableError, match=r"settings.batch_size is 3 there, 4 here; give another --folder"):
        export(whole_run, "pairs", folder, settings=SETTINGS.with_values(["batch_size=4"]))
    with pytest.raises(TableError, match=r"has shards of another table, .*/pairs; give another --folder"):
        export(whole_run, "targets", folder)


def test_a_disk_too_full_is_refused(whole_run, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(webdataset.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(StorageError, match=r"needs about 0.2 MB more, and its disk has 0.0 MB free"):
        export(whole_run, "pairs", tmp_path / "new/export", runner=in_process)
