"""LATENTS and TARGETS in buckets: images of several shapes in one unit, and their loaders."""

import itertools

import numpy as np
import pyarrow as pa
import pytest
import torch
from in_process import in_process
from latent_inputs import encode, verify
from memory_table import ids, take
from target_inputs import SETTINGS as TARGETS
from target_inputs import online_targets

from pipelines.datasets.latents import recomputer
from pipelines.datasets.settings import LatentsSettings
from pipelines.datasets.targets import compute_targets
from pipelines.datasets.targets import recomputer as targets_recomputer
from pipelines.loading.branches import BranchLoader, branch_and_draw
from pipelines.loading.buckets import BucketLoader, count_training_rows, is_bucketed, make_loader
from pipelines.loading.loader import BatchLoader
from pipelines.loading.rows import to_batch
from pipelines.loading.settings import LoaderSettings
from pipelines.sources.shards import ShardRow, write_shard
from pipelines.sources.webdataset import list_shards
from pipelines.stages.crop import buckets_of
from pipelines.stages.image import CropImage, EncodedImage
from pipelines.stages.settings import Buckets, Encoding, ImageSettings
from pipelines.tables.schemas import array_type, read_arrays, to_png
from pipelines.tables.table import TableError
from pipelines.tables.units import finite_rows, keep_where
from snapfusion.models.load import load
from snapfusion.noise import gaussian
from snapfusion.settings import SettingsError
from snapfusion.training.draws import row_key

IMAGES = ImageSettings(min_side=2, buckets=Buckets(max_aspect=3.0), crop="random")
SETTINGS = LatentsSettings(rows_per_unit=7, images=IMAGES, encoding=Encoding(batch_size=2))
SHAPES = buckets_of(Buckets(max_aspect=3.0), size=16, step=4)
SIDES = [(20, 20), (12, 30), (30, 12), (16, 24), (6, 60), (24, 16), (40, 4), (16, 16), (12, 20), (33, 32)]
"""Of the images in a shard, repeated; the fifth is 1:10 and the seventh 10:1."""


def image(number: int) -> bytes:
    sides = SIDES[number % len(SIDES)]
    return to_png(np.random.Generator(np.random.Philox(number)).integers(0, 256, (*sides, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    for index in range(2):
        images = [b"no picture" if n == 5 else image(n + index) for n in range(12)]
        rows = [
            ShardRow(image=data, caption=f"number {n}", url=f"http://o/{n}") for n, data in enumerate(images)
        ]
        write_shard(str(folder), rows, index=index, extension="png", rows_per_shard=100)
    return str(folder)


@pytest.fixture(scope="module")
def latents(shards, tiny_teacher, tmp_path_factory):
    return encode(tmp_path_factory.mktemp("latents") / "latents", shards, tiny_teacher, settings=SETTINGS)


@pytest.fixture(scope="module")
def targets(latents, tiny_teacher, tmp_path_factory):
    url = str(tmp_path_factory.mktemp("targets") / "targets")
    return compute_targets(TARGETS, teacher=tiny_teacher, latents=latents, url=url, run=in_process)


# LATENTS.


def test_unit_of_several_shapes_is_one_file(latents):
    assert [file.rows for file in latents.units] == [6, 5, 6, 5]
    assert {reason["reason"] for reason in latents.rejected_rows()} == {"not_an_image"}
    for account in latents.manifests().values():
        assert account.rows_read == account.rows_written + len(account.rejections)
    rows = latents.read()
    expected = [f"web/{s:05d}/{s:05d}{n:02d}" for s in (0, 1) for n in range(12) if n != 5]
    assert rows["id"].to_pylist() == expected
    assert rows.schema.field("latent").metadata == {b"shape": b"4,*,*", b"dtype": b"<f2", b"cell": b"2"}
    assert {rows.schema.field(side).type for side in ("height", "width")} == {pa.int32()}


def test_each_image_is_in_its_aspects_bucket(latents):
    rows = latents.read().to_pylist()
    assert {(row["height"], row["width"]) for row in rows} == set(SHAPES)
    assert [(row["height"], row["width"]) for row in rows][:4] == [(16, 16), (8, 24), (24, 8), (12, 20)]
    for row in rows:
        assert len(row["latent"]) == 4 * row["height"] // 2 * row["width"] // 2 * 2


def test_latent_is_that_of_the_cropped_image(latents, tiny_teacher):
    bundle, framed = load(tiny_teacher), CropImage(settings=IMAGES, shapes=SHAPES)
    unit = latents.read_unit(latents.units[0])
    for row, number in enumerate((0, 1, 2, 3, 4, 6)):
        pixels = torch.from_numpy(framed(EncodedImage(image(number), row=unit["id"][row].as_py())))
        expected = bundle.encode_images(pixels.permute(2, 0, 1)[None])[0]
        # Another batch of the network rounds otherwise.
        np.testing.assert_allclose(read_arrays(unit, "latent")[row], expected, rtol=0, atol=2e-3)


def test_table_without_buckets_has_no_sides(shards, tiny_teacher, tmp_path):
    settings = SETTINGS.with_values(["images.buckets=null"])
    plain = encode(tmp_path / "plain", shards, tiny_teacher, settings=settings)
    rows = plain.read()
    assert rows.schema.names == ["id", "source_id", "caption", "token_ids", "latent"]
    assert rows.schema.field("latent").metadata == {b"shape": b"4,8,8", b"dtype": b"<f2"}
    assert not is_bucketed(plain.identity)
    with pytest.raises(TableError, match=r"images\.buckets\.?\w* is"):
        encode(plain.url, shards, tiny_teacher, settings=SETTINGS)


@pytest.mark.parametrize("size", [8, 24])
def test_images_may_have_another_size(shards, tiny_teacher, tmp_path, size):
    settings = SETTINGS.with_values(["images.buckets=null", f"images.size={size}"])
    table = encode(tmp_path / "sized", shards, tiny_teacher, settings=settings)
    assert array_type(table.read().schema.field("latent")).shape == (4, size // 2, size // 2)
    report = verify(table, recomputer(table, model=tiny_teacher, shards=list_shards(shards), source="web"))
    assert (report.recomputed, report.exact, report.faults) == (4, 4, ())


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        ("images.size=18", r"images\.size is 18; multiples of 4"),
        ("images.size=2", r"images\.size is 2; multiples of 4"),
        # The largest bucket's pixels bound the rows.
        ("rows_per_unit=180000", "rows_per_unit is 180000; images of 16 px"),
    ],
)
def test_unfit_size_or_unit_is_refused(shards, tiny_teacher, tmp_path, change, refusal):
    with pytest.raises(SettingsError, match=rf"^latents\.{refusal}"):
        encode(tmp_path / "x", shards, tiny_teacher, settings=SETTINGS.with_values([change]))


def test_bucketed_latents_are_recomputed_exactly(latents, shards, tiny_teacher):
    recompute = recomputer(latents, model=tiny_teacher, shards=list_shards(shards), source="web")
    report = verify(latents, recompute)
    assert (report.recomputed, report.exact, report.faults, report.notes) == (4, 4, (), ())


def test_row_of_wrong_shape_is_refused(latents):
    rows = latents.read_unit(latents.units[0])
    swapped = rows.set_column(rows.schema.get_field_index("height"), "height", rows["width"])
    with pytest.raises(ValueError, match=r"row 0 has 384 bytes, <f2 .* has 1152"):
        read_arrays(swapped.slice(1, 1), "latent")
    with pytest.raises(ValueError, match="rows differ in shape"):
        array_type(rows.schema.field("latent")).unpack(rows["latent"].to_pylist())
    with pytest.raises(ValueError, match=r"\(4, 8\); \(4, None, None\) is accepted"):
        array_type(rows.schema.field("latent")).pack([np.zeros((4, 8))])


def test_rows_not_finite_are_dropped_in_any_shape():
    rows = [np.zeros((4, 2, 3)), np.full((4, 3, 2), np.nan), np.ones((4, 1, 1))]
    finite = finite_rows(rows)
    assert finite == [True, False, True]
    assert [row.shape for row in keep_where(finite, rows)] == [(4, 2, 3), (4, 1, 1)]


# TARGETS.


def test_targets_have_the_shapes_of_latents(targets, latents, tiny_teacher):
    known = {row["id"]: row for row in latents.read().to_pylist()}
    rows = targets.read()
    assert is_bucketed(targets.identity)
    assert rows.num_rows == 2 * latents.num_rows
    for row, x_target in zip(rows.to_pylist(), read_arrays(rows, "x_target"), strict=True):
        parent = known[row["id"].rpartition("#")[0]]
        for name in ("latent", "height", "width", "source_id"):
            assert row[name] == parent[name]
        assert x_target.shape == (4, row["height"] // 2, row["width"] // 2)
        assert row["noise_key"] == row_key(7, parent["id"], row["draw"])


def test_target_is_independent_of_other_shapes(targets, latents, tiny_teacher):
    """Each has its own shape and noise, and is as if it were computed alone."""
    online, parent = online_targets(tiny_teacher, TARGETS.teaching), latents.units[1]
    rows = latents.read_unit(parent)
    unit = next(file for file in targets.units if file.unit.endswith(parent.unit))
    guided, draw = branch_and_draw(unit.unit)
    stored = read_arrays(targets.read_unit(unit), "x_target")
    for number, latent in enumerate(read_arrays(rows, "latent")):
        one = to_batch(rows.slice(number, 1).select(["id", "token_ids"]))
        one.columns["latent"] = torch.from_numpy(latent.astype(np.float32))[None]
        key = row_key(7, rows["id"][number].as_py(), draw)
        computed = online.compute(one, [key], guided=guided)
        assert torch.equal(computed.eps[0], gaussian(key, latent.shape))
        np.testing.assert_allclose(stored[number], computed.x_target[0].numpy(), rtol=2e-2, atol=2e-2)


def test_bucketed_targets_are_recomputed_exactly(targets, latents, tiny_teacher):
    report = verify(targets, targets_recomputer(targets, teacher=tiny_teacher, latents=latents), units=4)
    assert (report.recomputed, report.exact, report.faults) == (4, 4, ())


# Loaders.


def test_table_determines_its_loader(latents):
    counts = count_training_rows(latents, held_out=0.0)
    assert [sum(count.values()) for count in counts] == [file.rows for file in latents.units]
    options = {"columns": ("latent",), "global_batch": 3, "seed": 0, "settings": LoaderSettings()}
    assert isinstance(make_loader(latents, counts=counts, **options), BucketLoader)
    assert isinstance(make_loader(latents, counts=[6, 5, 6, 5], **options), BatchLoader)
    with pytest.raises(ValueError, match="no rows to train on"):
        make_loader(latents, counts=[{}, {}], **options)


def test_bucketed_targets_load_in_one_shape_each(targets):
    def guided(step: int) -> bool:
        return step % 3 == 1

    def made():
        counts = count_training_rows(targets, held_out=0.2)
        settings = LoaderSettings(window_units=2, held_out=0.2)
        return BranchLoader(targets, guided=guided, global_batch=4, seed=0, settings=settings, counts=counts)

    whole = take(made(), count=24)
    whole_ids = [batch.ids for batch in whole]
    shapes = set()
    for step, batch in enumerate(whole):
        assert ("w" in batch.columns) == guided(step)
        assert batch["latent"].shape == batch["x_target"].shape
        shapes.add(tuple(batch["latent"].shape[2:]))
    assert len(shapes) > 2
    assert ids(made(), start=7, count=9) == whole_ids[7:16]
    halves = [ids(made(), rank=rank, world=2) for rank in range(2)]
    joined = [sorted(first + second) for first, second in zip(*halves, strict=True)]
    assert joined == [sorted(batch) for batch in whole_ids[:20]]
    for branch in (True, False):
        kept = list(made().held_out(guided=branch, rows=3))
        assert all(("w" in batch.columns) == branch for batch in kept)
        assert not set(itertools.chain(*whole_ids)) & {row for batch in kept for row in batch.ids}
