"""LATENTS: every usable image of a shard, in units that do not depend on the reader."""

import io

import numpy as np
import pytest
import torch
from conftest import tiny_bundle
from delta_opens import record_opens
from latent_inputs import SETTINGS, encode, first_units, make_shards, noise_image, verify
from PIL import Image
from poison import KilledBy, poison_of
from safetensors.torch import save_file

from pipelines.datasets.latents import check_latents, recomputer
from pipelines.datasets.shard_plan import pending_shards
from pipelines.rejections import Rejected
from pipelines.sources.shards import ShardRow, write_shard
from pipelines.sources.webdataset import Shard, list_shards
from pipelines.stages.image import decode_image
from pipelines.stages.read import ReadShard
from pipelines.stages.settings import ImageSettings
from pipelines.stages.shard_work import ShardWork
from pipelines.tables.manifest import total_rejected
from pipelines.tables.schemas import read_array
from pipelines.tables.table import TableError, open_table
from snapfusion.models.load import load
from snapfusion.models.save import save
from snapfusion.settings import SettingsError


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def latents(shards, tiny_teacher, tmp_path_factory):
    return encode(tmp_path_factory.mktemp("latents") / "latents", shards, tiny_teacher)


def test_every_row_is_written_or_rejected(latents):
    assert latents.num_rows == 18
    reasons = {row["id"]: row["reason"] for row in latents.rejected_rows()}
    assert reasons == {"web/00000/0000003": "not_an_image", "web/00001/0000103": "not_an_image"}
    manifests = latents.manifests().values()
    assert sum(manifest.rows_read for manifest in manifests) == 20
    final = {manifest.unit for manifest in manifests if manifest.final}
    assert final == {"web-00000-000008-000010", "web-00001-000008-000010"}


def test_latent_is_scaled_posterior_mean(latents, tiny_teacher):
    unit = latents.read_unit(latents.units[0])
    bundle = load(tiny_teacher)
    images = [decode_image(noise_image(n), size=16, settings=ImageSettings(min_side=8)) for n in (0, 1, 2)]
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    with torch.inference_mode():
        mean = bundle.vae.encode(pixels.float() / 127.5 - 1.0).latent_dist.mean
    np.testing.assert_array_equal(read_array(unit, "latent"), (mean * 0.4).half().numpy())
    assert unit.column("source_id").to_pylist() == [f"http://origin/0/{n}" for n in (0, 1, 2)]


def test_models_saved_from_a_merged_one_share_its_latents(shards, tiny_teacher, tmp_path):
    conv_in = load(tiny_teacher).unet.conv_in.weight
    lora = {
        "lora_unet_conv_in.lora_down.weight": torch.ones(1, *conv_in.shape[1:]),
        "lora_unet_conv_in.lora_up.weight": torch.ones(len(conv_in), 1, 1, 1),
    }
    save_file(lora, tmp_path / "style.safetensors")
    save_file({"<cat>": torch.ones(16)}, tmp_path / "cat.safetensors")
    styled = f"{tiny_teacher}?lora={tmp_path / 'style.safetensors'}"
    for name, source in (("styled", styled), ("cat", f"{styled}&embedding={tmp_path / 'cat.safetensors'}")):
        latents = encode(tmp_path / f"latents-{name}", shards, source)
        save(load(source), tmp_path / name, dtype=torch.float32)
        check_latents(latents, bundle=load(str(tmp_path / name)))
    with pytest.raises(TableError, match="added_tokens"):
        check_latents(latents, bundle=load(styled))


def test_stopped_run_is_completed(latents, shards, tiny_teacher, tmp_path):
    part = encode(tmp_path / "latents", shards, tiny_teacher, run=first_units(2))
    assert [unit.unit for unit in part.units] == ["web-00000-000000-000004", "web-00000-000004-000008"]
    whole = encode(tmp_path / "latents", shards, tiny_teacher)
    assert whole.read().equals(latents.read())
    assert [unit.unit for unit in whole.units] == [unit.unit for unit in latents.units]


def test_progress_total_comes_from_sidecars(shards, tiny_teacher, tmp_path):
    reports = []
    encode(tmp_path / "latents", shards, tiny_teacher, on_progress=reports.append)
    assert (reports[-1].rows, reports[-1].total) == (20, 20)


def test_complete_table_has_nothing_pending(latents, shards):
    assert list(pending_shards(list_shards(str(shards)), latents.manifests().values(), source="web")) == []


def test_complete_run_opens_two_delta_tables(latents, shards, tiny_teacher, monkeypatch):
    opened = record_opens(monkeypatch)
    total_rejected(encode(latents.url, shards, tiny_teacher).manifests().values())
    assert opened == [latents.url, f"{latents.url}.units"]


def test_new_shards_are_appended(tiny_teacher, tmp_path):
    folder, url = tmp_path / "shards", tmp_path / "latents"
    first = encode(url, make_shards(folder, shards=1), tiny_teacher)
    second = encode(url, make_shards(folder, shards=2), tiny_teacher)
    assert (first.num_rows, second.num_rows) == (9, 18)
    assert open_table(str(url), version=first.version).num_rows == 9


def test_other_shard_of_same_name_is_refused(latents, tiny_teacher, tmp_path):
    with pytest.raises(TableError, match="unit web-00000-000000-000004"):
        encode(latents.url, make_shards(tmp_path, rows=11), tiny_teacher)


def test_empty_shard_is_one_empty_unit(tiny_teacher, tmp_path):
    table = encode(tmp_path / "latents", make_shards(tmp_path / "shards", shards=1, rows=0), tiny_teacher)
    assert (table.num_rows, len(table.units)) == (0, 1)


def test_last_full_unit_is_final(tiny_teacher, tmp_path):
    folder = make_shards(tmp_path / "shards", shards=1, rows=8, bad=())
    table = encode(tmp_path / "latents", folder, tiny_teacher)
    assert [manifest.final for _, manifest in sorted(table.manifests().items())] == [False, True]


def test_torn_shard_keeps_rows_before_the_tear(tiny_teacher, tmp_path):
    tar = make_shards(tmp_path, shards=1, bad=()) / "00000.tar"
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])
    table = encode(tmp_path / "latents", tmp_path, tiny_teacher)
    reasons = [row["reason"] for row in table.rejected_rows()]
    assert 0 < table.num_rows < 10
    assert table.num_rows + len(reasons) == 10
    assert set(reasons) == {"torn_shard"}
    assert max(table.manifests().items())[1].final


def test_similar_shard_names_give_different_units():
    names = set()
    for name in ("a b", "a_b", "a/b", "a-b"):
        work = ShardWork(shard=Shard(url="", name=name, size=1), source=f"web/{name}", committed=())
        names.add(work.unit(start=0, stop=1).name)
    assert len(names) == 4
    assert all("/" not in name and " " not in name for name in names)


@pytest.mark.slow
def test_image_that_kills_its_process_is_rejected_alone(shards):
    names = ("rows_per_unit", "shards", "images", "selection")
    stage = ReadShard(shapes=((16, 16),), **{name: getattr(SETTINGS, name) for name in names})
    stage.decode = KilledBy(poison_of(noise_image(1)), size=16)
    [work, *_] = pending_shards(list_shards(str(shards)), [], source="web")
    units = list(stage.isolated(work))
    reasons = [rejection.reason for unit in units for rejection in unit.rejections]
    assert reasons == ["crashed", "not_an_image"]
    assert sum(len(unit.ids) for unit in units) == 8


def test_too_large_unit_is_refused(shards, tiny_teacher, tmp_path):
    settings = SETTINGS.with_values(["rows_per_unit=200000"])
    with pytest.raises(SettingsError, match=r"rows_per_unit is 200000.* 174762"):
        encode(tmp_path / "latents", shards, tiny_teacher, settings=settings)


def test_units_are_recomputed_from_shards(latents, shards, tiny_teacher, tmp_path):
    def recompute(model: str, folder):
        return recomputer(latents, model=model, shards=list_shards(str(folder)), source="web")

    found = verify(latents, recompute(tiny_teacher, shards))
    assert (found.recomputed, found.exact, found.faults, found.notes) == (6, 6, (), ())
    part = verify(latents, recompute(tiny_teacher, make_shards(tmp_path / "one", shards=1)))
    assert (part.recomputed, len(part.notes)) == (3, 3)
    save(tiny_bundle(seed=3), tmp_path / "other")
    with pytest.raises(TableError, match="another VAE"):
        recompute(str(tmp_path / "other"), shards)


def test_images_of_all_modes_are_encoded(tiny_teacher, tmp_path):
    modes = {"CMYK": "jpeg", "P": "png", "L": "jpeg", "LA": "png", "RGBA": "png", "1": "png", "I;16": "png"}
    rows = []
    for mode, kind in modes.items():
        buffer = io.BytesIO()
        Image.new("L", (16, 16), 128).convert(mode).save(buffer, kind)
        rows.append(ShardRow(image=buffer.getvalue(), caption=mode, url=mode))
    write_shard(str(tmp_path / "s"), rows, index=0, rows_per_shard=100)
    assert encode(tmp_path / "latents", tmp_path / "s", tiny_teacher).num_rows == len(modes)


class RejectsOneRow:
    """A `RowFilter` that rejects one row."""

    row_id = "web/00001/0000105"

    def for_shard(self, shard):
        def check(_sample, row_id: str) -> None:
            if row_id == self.row_id:
                raise Rejected("unsafe", f"of {shard.name}")

        return check

    def describe(self):
        return {"refuses": self.row_id}


def test_filter_rejects_and_is_part_of_identity(shards, tiny_teacher, tmp_path):
    row_filter = RejectsOneRow()
    table = encode(tmp_path / "latents", shards, tiny_teacher, filters=[row_filter])
    assert table.num_rows == 17
    (row,) = [row for row in table.rejected_rows() if row["reason"] == "unsafe"]
    assert (row["id"], row["detail"]) == (row_filter.row_id, "of 00001")
    inputs = {"model": tiny_teacher, "shards": list_shards(str(shards)), "source": "web"}
    assert not verify(table, recomputer(table, filters=[row_filter], **inputs)).faults
    with pytest.raises(TableError, match="refuses"):
        encode(tmp_path / "latents", shards, tiny_teacher)
