"""LATENTS: every usable image of a shard, in units that do not depend on who read them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_bundle
from in_process import in_process
from PIL import Image

from pipelines.datasets.latents import encode_latents, pending_shards, recomputer
from pipelines.datasets.settings import LatentsSettings
from pipelines.rejections import Rejected
from pipelines.sources.shards import ShardRow, write_shard
from pipelines.sources.webdataset import list_shards
from pipelines.stages.image import decode_image
from pipelines.stages.read import ReadShard
from pipelines.stages.settings import ImageSettings
from pipelines.tables.schemas import array_type, to_png
from pipelines.tables.table import TableError, open_table
from pipelines.tables.verification import verify_table
from snapfusion.models.load import load
from snapfusion.models.save import save
from snapfusion.settings import SettingsError

SETTINGS = LatentsSettings(rows_per_unit=4, images=ImageSettings(min_side=8))


def picture(n: int) -> bytes:
    pixels = np.random.Generator(np.random.Philox(n)).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    return to_png(pixels)


def make_shards(folder: Path, *, shards: int = 2, rows: int = 10, bad: tuple[int, ...] = (3,)) -> None:
    for index in range(shards):
        pictures = [
            ShardRow(
                image=b"this is text" if n in bad else picture(100 * index + n),
                caption=f"picture {n}",
                url=f"http://origin/{index}/{n}",
            )
            for n in range(rows)
        ]
        write_shard(str(folder), pictures, index=index, extension="png", rows_per_shard=100)


def encode(
    url: Path, folder: Path, model: str, *, settings: LatentsSettings = SETTINGS, run=in_process, **more
):
    shards = list_shards(str(folder))
    return encode_latents(settings, model=model, shards=shards, source="web", url=str(url), run=run, **more)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    make_shards(folder)
    return folder


@pytest.fixture(scope="module")
def latents(shards, tiny_teacher, tmp_path_factory):
    return encode(tmp_path_factory.mktemp("latents") / "latents", shards, tiny_teacher)


def test_every_usable_row_arrives_and_the_others_are_accounted(latents):
    assert latents.num_rows == 18
    assert [(row["id"], row["reason"]) for row in latents.rejected_rows()] == [
        ("web/00000/0000003", "not_an_image"),
        ("web/00001/0000103", "not_an_image"),
    ]
    known = list(latents.manifests().values())
    assert sum(account.rows_read for account in known) == 20
    assert sorted(account.unit for account in known if account.final) == [
        "web-00000-000008-000010",
        "web-00001-000008-000010",
    ]


def test_a_latent_is_the_posterior_mean_times_the_scaling_factor(latents, tiny_teacher):
    unit = latents.read_unit(latents.units[0])
    bundle = load(tiny_teacher)
    images = [decode_image(picture(n), size=16, settings=ImageSettings(min_side=8)) for n in (0, 1, 2)]
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    with torch.inference_mode():
        mean = bundle.vae.encode(pixels.float() / 127.5 - 1.0).latent_dist.mean
    stored = array_type(unit.schema.field("latent")).unpack(unit.column("latent").to_pylist())
    np.testing.assert_array_equal(stored, (mean * 0.4).half().numpy())
    assert unit.column("source_id").to_pylist() == [f"http://origin/0/{n}" for n in (0, 1, 2)]


def test_a_shard_that_was_half_read_is_gone_on_with(latents, shards, tiny_teacher, tmp_path):
    url = tmp_path / "latents"

    def first_units_only(items, stages):
        for number, written in enumerate(in_process(items, stages)):
            if number == 2:
                return
            yield written

    part = encode(url, shards, tiny_teacher, run=first_units_only)
    assert [unit.unit for unit in part.units] == ["web-00000-000000-000004", "web-00000-000004-000008"]
    whole = encode(url, shards, tiny_teacher)
    assert whole.read().equals(latents.read())
    assert [unit.unit for unit in whole.units] == [unit.unit for unit in latents.units]


def test_progress_knows_the_total_from_the_sidecars(shards, tiny_teacher, tmp_path):
    seen = []
    encode(tmp_path / "latents", shards, tiny_teacher, on_progress=seen.append)
    assert [(progress.rows, progress.total) for progress in seen][-1] == (20, 20)


def test_a_finished_table_asks_for_nothing(latents, shards):
    known = list(latents.manifests().values())
    assert list(pending_shards(list_shards(str(shards)), source="web", accounts=known)) == []


def test_new_shards_are_appended(shards, tiny_teacher, tmp_path):
    folder, url = tmp_path / "shards", tmp_path / "latents"
    make_shards(folder, shards=1)
    first = encode(url, folder, tiny_teacher)
    make_shards(folder, shards=2)
    second = encode(url, folder, tiny_teacher)
    assert (first.num_rows, second.num_rows) == (9, 18)
    assert open_table(str(url), version=first.version).num_rows == 9


def test_another_shard_of_the_same_name_is_refused(latents, tiny_teacher, tmp_path):
    make_shards(tmp_path, rows=11)
    with pytest.raises(TableError, match="not the shard that unit web-00000-000000-000004 was read from"):
        encode(Path(latents.url), tmp_path, tiny_teacher)


def test_a_shard_with_no_row_is_one_empty_unit(tiny_teacher, tmp_path):
    make_shards(tmp_path / "shards", shards=1, rows=0)
    table = encode(tmp_path / "latents", tmp_path / "shards", tiny_teacher)
    assert (table.num_rows, len(table.units)) == (0, 1)


def test_a_shard_whose_rows_end_with_a_unit_has_a_final_unit(tiny_teacher, tmp_path):
    make_shards(tmp_path / "shards", shards=1, rows=8, bad=())
    table = encode(tmp_path / "latents", tmp_path / "shards", tiny_teacher)
    assert [account.final for _, account in sorted(table.manifests().items())] == [False, True]


def test_a_torn_shard_keeps_its_rows_before_the_tear(tiny_teacher, tmp_path):
    make_shards(tmp_path, shards=1, bad=())
    tar = tmp_path / "00000.tar"
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])
    table = encode(tmp_path / "latents", tmp_path, tiny_teacher)
    [*_, last] = [account for _, account in sorted(table.manifests().items())]
    reasons = [row["reason"] for row in table.rejected_rows()]
    assert 0 < table.num_rows < 10
    assert table.num_rows + len(reasons) == 10
    assert set(reasons) == {"torn_shard"}
    assert last.final


def test_two_names_that_become_one_file_name_stay_apart():
    from pipelines.sources.webdataset import Shard
    from pipelines.stages.read import ShardWork

    names = [
        ShardWork(shard=Shard(url="", name=name, size=1), source=f"web/{name}", committed=())
        .unit(start=0, stop=1)
        .name
        for name in ("a b", "a_b", "a/b", "a-b")
    ]
    assert len(set(names)) == 4
    assert all("/" not in name and " " not in name for name in names)


def test_an_image_that_kills_its_process_is_set_aside_and_its_neighbours_kept(shards, tiny_teacher):
    from poison import KilledBy, poison_of

    stage = ReadShard(
        shapes=((16, 16),),
        rows_per_unit=4,
        shards=SETTINGS.shards,
        images=SETTINGS.images,
        selection=SETTINGS.selection,
    )
    stage.decode = KilledBy(poison_of(picture(1)), size=16)
    [work, *_] = pending_shards(list_shards(str(shards)), source="web", accounts=[])
    units = list(stage.isolated(work))
    assert [rejection.reason for unit in units for rejection in unit.rejections] == [
        "crashed",
        "not_an_image",
    ]
    assert sum(len(unit.ids) for unit in units) == 8


def test_a_unit_too_large_for_a_block_is_refused(shards, tiny_teacher, tmp_path):
    with pytest.raises(SettingsError, match="rows_per_unit is 200000; images of 16 px allow at most 174762"):
        encode(
            tmp_path / "latents",
            shards,
            tiny_teacher,
            settings=SETTINGS.with_values(["rows_per_unit=200000"]),
        )


def test_a_table_is_made_again_from_its_shards(latents, shards, tiny_teacher, tmp_path):
    def verify(model: str, folder: Path):
        made = recomputer(latents, model=model, shards=list_shards(str(folder)), source="web")
        return verify_table(latents, recompute=made, units=99, seed=0)

    found = verify(tiny_teacher, shards)
    assert (found.recomputed, found.exact, found.faults, found.notes) == (6, 6, (), ())
    make_shards(tmp_path / "one", shards=1)
    partly = verify(tiny_teacher, tmp_path / "one")
    assert (partly.recomputed, len(partly.notes)) == (3, 3)
    save(tiny_bundle(seed=3), tmp_path / "other")
    with pytest.raises(TableError, match="another VAE"):
        verify(str(tmp_path / "other"), shards)


def test_a_picture_of_any_mode_becomes_a_latent(tiny_teacher, tmp_path):
    modes = {"CMYK": "jpeg", "P": "png", "L": "jpeg", "LA": "png", "RGBA": "png", "1": "png", "I;16": "png"}
    pictures = []
    for mode, kind in modes.items():
        buffer = io.BytesIO()
        Image.new("L", (16, 16), 128).convert(mode).save(buffer, kind)
        pictures.append(ShardRow(image=buffer.getvalue(), caption=mode, url=mode))
    write_shard(str(tmp_path / "s"), pictures, index=0, rows_per_shard=100)
    table = encode(tmp_path / "latents", tmp_path / "s", tiny_teacher)
    assert table.num_rows == len(modes)


class Refuses:
    """A veto on one row."""

    def __init__(self, row_id: str) -> None:
        self.row_id = row_id

    def on(self, shard):
        def check(_sample, row_id: str) -> None:
            if row_id == self.row_id:
                raise Rejected("unsafe", f"of {shard.name}")

        return check

    def describe(self):
        return {"refuses": self.row_id}


def test_a_veto_rejects_rows_is_part_of_the_identity_and_verifies(shards, tiny_teacher, tmp_path):
    veto = Refuses("web/00001/0000105")
    table = encode(tmp_path / "latents", shards, tiny_teacher, vetoes=[veto])
    assert table.num_rows == 17
    (row,) = [row for row in table.rejected_rows() if row["reason"] == "unsafe"]
    assert (row["id"], row["detail"]) == (veto.row_id, "of 00001")
    remade = recomputer(
        table, model=tiny_teacher, shards=list_shards(str(shards)), source="web", vetoes=[veto]
    )
    assert not verify_table(table, recompute=remade, units=6, seed=0).faults
    with pytest.raises(TableError, match="refuses"):
        encode(tmp_path / "latents", shards, tiny_teacher)
