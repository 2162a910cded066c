"""Pictures of several shapes: one data file a unit; batches of one shape, in an order that holds."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from in_process import in_process
from target_inputs import SETTINGS as TARGETS

from pipelines.datasets.latents import encode_latents, recomputer
from pipelines.datasets.settings import LatentsSettings
from pipelines.datasets.targets import compute_targets
from pipelines.datasets.targets import recomputer as remake_targets
from pipelines.loading.branches import BranchLoader, branch_and_draw
from pipelines.loading.buckets import (
    BucketLoader,
    count_by_shape,
    count_training_rows,
    is_bucketed,
    make_loader,
)
from pipelines.loading.loader import BatchLoader, is_held_out, to_batch
from pipelines.loading.settings import LoaderSettings
from pipelines.sources.shards import ShardRow, write_shard
from pipelines.sources.webdataset import list_shards
from pipelines.stages.crop import buckets_of
from pipelines.stages.image import CropImage, EncodedImage
from pipelines.stages.settings import Buckets, Encoding, ImageSettings
from pipelines.tables.schemas import array_type, latents_schema, read_arrays, to_png
from pipelines.tables.table import TableError
from pipelines.tables.units import finite_rows, keep_where
from pipelines.tables.verification import verify_table
from snapfusion.models.load import load
from snapfusion.noise import gaussian
from snapfusion.settings import SettingsError
from snapfusion.training.draws import row_key

IMAGES = ImageSettings(min_side=2, buckets=Buckets(max_aspect=3.0), crop="random")
SETTINGS = LatentsSettings(rows_per_unit=7, images=IMAGES, encoding=Encoding(batch_size=2))
SHAPES = buckets_of(Buckets(max_aspect=3.0), size=16, step=4)
SIDES = [(20, 20), (12, 30), (30, 12), (16, 24), (6, 60), (24, 16), (40, 4), (16, 16), (12, 20), (33, 32)]
"""Of the pictures in a shard, over and over; the fifth is 1:10 and the seventh 10:1."""


def picture(number: int) -> bytes:
    sides = SIDES[number % len(SIDES)]
    return to_png(np.random.Generator(np.random.Philox(number)).integers(0, 256, (*sides, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    for index in range(2):
        rows = [
            ShardRow(
                image=b"no picture" if n == 5 else picture(n + index),
                caption=f"number {n}",
                url=f"http://o/{n}",
            )
            for n in range(12)
        ]
        write_shard(str(folder), rows, index=index, extension="png", rows_per_shard=100)
    return str(folder)


def encode(url, shards, model, settings=SETTINGS):
    return encode_latents(
        settings, model=model, shards=list_shards(shards), source="web", url=str(url), run=in_process
    )


@pytest.fixture(scope="module")
def latents(shards, tiny_teacher, tmp_path_factory):
    return encode(tmp_path_factory.mktemp("latents") / "latents", shards, tiny_teacher)


@pytest.fixture(scope="module")
def targets(latents, tiny_teacher, tmp_path_factory):
    url = str(tmp_path_factory.mktemp("targets") / "targets")
    return compute_targets(TARGETS, teacher=tiny_teacher, latents=latents, url=url, run=in_process)


# LATENTS.


def test_a_unit_with_rows_of_several_shapes_is_one_file_and_loses_none(latents):
    assert [file.rows for file in latents.units] == [6, 5, 6, 5]
    assert {reason["reason"] for reason in latents.rejected_rows()} == {"not_an_image"}
    for account in latents.manifests().values():
        assert account.rows_read == account.rows_written + len(account.rejections)
    rows = latents.read()
    assert rows["id"].to_pylist() == [
        f"web/{s:05d}/{s:05d}{n:02d}" for s in (0, 1) for n in range(12) if n != 5
    ]
    assert rows.schema.field("latent").metadata == {b"shape": b"4,*,*", b"dtype": b"<f2", b"cell": b"2"}
    assert {rows.schema.field(side).type for side in ("height", "width")} == {pa.int32()}


def test_each_picture_is_in_the_bucket_of_its_aspect(latents):
    rows = latents.read().to_pylist()
    assert {(row["height"], row["width"]) for row in rows} == set(SHAPES)
    first = [(row["height"], row["width"]) for row in rows][:4]
    assert first == [(16, 16), (8, 24), (24, 8), (12, 20)]
    for row in rows:
        assert len(row["latent"]) == 4 * row["height"] // 2 * row["width"] // 2 * 2


def test_a_latent_is_that_of_its_framed_picture(latents, tiny_teacher):
    bundle, framed = load(tiny_teacher), CropImage(settings=IMAGES, shapes=SHAPES)
    unit = latents.read_unit(latents.units[0])
    for row, number in enumerate((0, 1, 2, 3, 4, 6)):
        pixels = torch.from_numpy(framed(EncodedImage(picture(number), row=unit["id"][row].as_py())))
        expected = bundle.encode_images(pixels.permute(2, 0, 1)[None])[0]
        # Another batch of the network rounds otherwise.
        np.testing.assert_allclose(read_arrays(unit, "latent")[row], expected, rtol=0, atol=2e-3)


def test_a_table_without_buckets_has_the_columns_that_it_had(shards, tiny_teacher, tmp_path):
    plain = encode(tmp_path / "plain", shards, tiny_teacher, SETTINGS.with_values(["images.buckets=null"]))
    rows = plain.read()
    assert rows.schema.names == ["id", "source_id", "caption", "token_ids", "latent"]
    assert rows.schema.field("latent").metadata == {b"shape": b"4,8,8", b"dtype": b"<f2"}
    assert not is_bucketed(plain.identity)
    with pytest.raises(TableError, match=r"images\.buckets\.?\w* is"):
        encode(plain.url, shards, tiny_teacher)


@pytest.mark.parametrize("size", [8, 24])
def test_pictures_of_another_size_than_the_models_own(shards, tiny_teacher, tmp_path, size):
    settings = SETTINGS.with_values(["images.buckets=null", f"images.size={size}"])
    table = encode(tmp_path / "sized", shards, tiny_teacher, settings)
    kind = array_type(table.read().schema.field("latent"))
    assert kind.shape == (4, size // 2, size // 2)
    made = recomputer(table, model=tiny_teacher, shards=list_shards(shards), source="web")
    found = verify_table(table, recompute=made, units=9, seed=0)
    assert (found.recomputed, found.exact, found.faults) == (4, 4, ())


@pytest.mark.parametrize("size", [18, 2])
def test_a_size_that_is_no_multiple_of_the_models_granularity_is_refused(
    shards, tiny_teacher, tmp_path, size
):
    with pytest.raises(SettingsError, match=rf"^latents\.images\.size is {size}; multiples of 4"):
        encode(tmp_path / "x", shards, tiny_teacher, SETTINGS.with_values([f"images.size={size}"]))


def test_the_largest_bucket_decides_how_many_rows_fit_a_unit(shards, tiny_teacher, tmp_path):
    with pytest.raises(SettingsError, match=r"^latents\.rows_per_unit is 180000; images of 16 px"):
        encode(tmp_path / "x", shards, tiny_teacher, SETTINGS.with_values(["rows_per_unit=180000"]))


def test_bucketed_latents_are_made_again_bit_for_bit(latents, shards, tiny_teacher):
    made = recomputer(latents, model=tiny_teacher, shards=list_shards(shards), source="web")
    found = verify_table(latents, recompute=made, units=9, seed=0)
    assert (found.recomputed, found.exact, found.faults, found.notes) == (4, 4, (), ())


def test_a_row_that_cannot_be_of_its_shape_is_told(latents):
    rows = latents.read_unit(latents.units[0])
    swapped = rows.set_column(rows.schema.get_field_index("height"), "height", rows["width"])
    with pytest.raises(ValueError, match=r"row 0 has 384 bytes, <f2 .* has 1152"):
        read_arrays(swapped.slice(1, 1), "latent")
    with pytest.raises(ValueError, match="rows differ in shape"):
        array_type(rows.schema.field("latent")).unpack(rows["latent"].to_pylist())
    with pytest.raises(ValueError, match=r"\(4, 8\); \(4, None, None\) is accepted"):
        array_type(rows.schema.field("latent")).pack([np.zeros((4, 8))])


def test_a_row_that_is_not_finite_is_set_aside_whatever_its_shape():
    rows = [np.zeros((4, 2, 3)), np.full((4, 3, 2), np.nan), np.ones((4, 1, 1))]
    finite = finite_rows(rows)
    assert finite == [True, False, True]
    assert [row.shape for row in keep_where(finite, rows)] == [(4, 2, 3), (4, 1, 1)]


# TARGETS.


def test_targets_of_latents_in_buckets_have_their_shapes(targets, latents, tiny_teacher):
    known = {row["id"]: row for row in latents.read().to_pylist()}
    rows = targets.read()
    assert is_bucketed(targets.identity)
    assert rows.num_rows == 2 * latents.num_rows
    for row, x_target in zip(rows.to_pylist(), read_arrays(rows, "x_target"), strict=True):
        parent = known[row["id"].rpartition("#")[0]]
        assert [row[name] for name in ("latent", "height", "width", "source_id")] == [
            parent[name] for name in ("latent", "height", "width", "source_id")
        ]
        assert x_target.shape == (4, row["height"] // 2, row["width"] // 2)
        assert row["noise_key"] == row_key(7, parent["id"], row["draw"])


def test_a_target_does_not_depend_on_the_shapes_beside_it(targets, latents, tiny_teacher):
    """Each of its own shape and noise, held to the teacher asked by itself."""
    from snapfusion.training.captions import CaptionEncoder
    from snapfusion.training.distillation_batch import OnlineTargets

    bundle, teaching = load(tiny_teacher), TARGETS.teaching
    lessons = OnlineTargets(
        bundle,
        captions=CaptionEncoder(bundle),
        settings=teaching,
        seed=teaching.seed,
    )
    parent = latents.units[1]
    rows = latents.read_unit(parent)
    unit = next(file for file in targets.units if file.unit.endswith(parent.unit))
    guided, draw = branch_and_draw(unit.unit)
    stored = read_arrays(targets.read_unit(unit), "x_target")
    for number, latent in enumerate(read_arrays(rows, "latent")):
        one = replace(
            to_batch(rows.slice(number, 1).select(["id", "token_ids"])),
            columns={
                "latent": torch.from_numpy(latent.astype(np.float32))[None],
                "token_ids": torch.from_numpy(
                    np.frombuffer(rows["token_ids"][number].as_py(), "<i4").astype(np.int64)
                )[None],
            },
        )
        key = row_key(7, rows["id"][number].as_py(), draw)
        lesson = lessons.compute(one, [key], guided=guided)
        assert torch.equal(lesson.eps[0], gaussian(key, latent.shape))
        np.testing.assert_allclose(stored[number], lesson.x_target[0].numpy(), rtol=2e-2, atol=2e-2)


def test_targets_in_buckets_are_made_again_bit_for_bit(targets, latents, tiny_teacher):
    made = remake_targets(targets, teacher=tiny_teacher, latents=latents)
    found = verify_table(targets, recompute=made, units=4, seed=1)
    assert (found.recomputed, found.exact, found.faults) == (4, 4, ())


# Batches of one shape.

SCHEMA = latents_schema(latent_shape=(4, 8, 8), num_tokens=3, cell=2)
UNITS = (9, 4, 12, 7, 1)
WIDE, TALL, SQUARE = (8, 24), (24, 8), (16, 16)


def shape_of(number: int):
    """Of ten rows seven are square, two wide and one tall."""
    return (SQUARE, WIDE, SQUARE, SQUARE, TALL, SQUARE, WIDE, SQUARE, SQUARE, SQUARE)[number % 10]


def row(number: int) -> dict:
    height, width = shape_of(number)
    latent = np.full((4, height // 2, width // 2), number / 8, "<f2")
    return {
        "id": f"r-{number}",
        "source_id": "o",
        "caption": "a",
        "token_ids": np.full(3, number, "<i4").tobytes(),
        "latent": latent.tobytes(),
        "height": height,
        "width": width,
    }


class Units:
    """A table in memory."""

    def __init__(self, schema=SCHEMA, row=row):
        numbers = itertools.count()
        self.tables = [
            pa.Table.from_pylist([row(next(numbers)) for _ in range(size)], schema=schema) for size in UNITS
        ]
        self.units = [
            SimpleNamespace(unit=f"u{index}", path=f"u{index}.parquet", rows=size, index=index)
            for index, size in enumerate(UNITS)
        ]

    def read_unit(self, unit, columns=None):
        rows = self.tables[unit.index]
        return rows if columns is None else rows.select(columns)


def loader(*, global_batch=4, seed=0, held_out=0.0):
    table = Units()
    return BucketLoader(
        table,
        columns=("latent", "token_ids"),
        global_batch=global_batch,
        seed=seed,
        settings=LoaderSettings(window_units=2, held_out=held_out),
        counts=count_by_shape(table, held_out=held_out),
    )


def take(made, *, start=0, count=20, rank=0, world=1):
    batches = made.batches(start, rank=rank, world=world)
    try:
        return list(itertools.islice(batches, count))
    finally:
        batches.close()


def ids(batches):
    return [batch.ids for batch in batches]


def test_all_rows_of_a_step_have_the_shape_of_its_bucket():
    made = loader()
    seen = take(made, count=60)
    for step, batch in enumerate(seen):
        height, width = made.bucket_at(step)
        assert batch["latent"].shape == (4, 4, height // 2, width // 2)
        for row_id, latent, tokens in zip(batch.ids, batch["latent"], batch["token_ids"], strict=True):
            number = int(row_id.removeprefix("r-"))
            assert shape_of(number) == (height, width)
            assert (latent == number / 8).all()
            assert (tokens == number).all()
    assert {made.bucket_at(step) for step in range(60)} == {SQUARE, WIDE, TALL}


@pytest.mark.parametrize("world", [2, 4])
def test_the_sequence_does_not_depend_on_the_number_of_workers(world):
    shares = [ids(take(loader(), rank=rank, world=world)) for rank in range(world)]
    joined = [Counter(itertools.chain(*parts)) for parts in zip(*shares, strict=True)]
    assert joined == [Counter(batch) for batch in ids(take(loader()))]


@pytest.mark.parametrize("start", [1, 2, 9, 17])
def test_the_sequence_does_not_depend_on_a_restart(start):
    assert ids(take(loader(), start=start, count=12)) == ids(take(loader(), count=30))[start : start + 12]


def test_another_seed_gives_another_sequence():
    assert ids(take(loader(seed=1))) != ids(take(loader()))


def test_each_bucket_shows_each_of_its_rows_once_an_epoch():
    made = loader(global_batch=3)
    seen = take(made, count=300)
    for shape, rows in Counter(map(shape_of, range(sum(UNITS)))).items():
        mine = list(
            itertools.chain(*(batch.ids for step, batch in enumerate(seen) if made.bucket_at(step) == shape))
        )
        epochs = [mine[start : start + rows] for start in range(0, 3 * rows, rows)]
        assert all(len(set(epoch)) == rows for epoch in epochs)
        assert {number for number in range(sum(UNITS)) if shape_of(number) == shape} == {
            int(row_id.removeprefix("r-")) for row_id in epochs[0]
        }
    assert made.rows_per_epoch == sum(UNITS)


def test_a_bucket_is_taken_as_often_as_it_has_rows():
    made = loader()
    taken = Counter(made.bucket_at(step) for step in range(4_000))
    rows = Counter(map(shape_of, range(sum(UNITS))))
    for shape, number in rows.items():
        assert taken[shape] / 4_000 == pytest.approx(number / sum(UNITS), abs=0.03)


def test_a_bucket_with_fewer_rows_than_a_batch_repeats_them():
    made = loader(global_batch=8)
    step = next(step for step in range(200) if made.bucket_at(step) == TALL)
    (batch,) = take(made, start=step, count=1)
    tall = [f"r-{number}" for number in range(sum(UNITS)) if shape_of(number) == TALL]
    assert len(tall) == 3
    assert set(batch.ids) == set(tall)
    assert set(Counter(batch.ids).values()) == {2, 3}


def test_held_out_rows_are_never_trained_on_and_all_evaluated():
    made = loader(held_out=0.3)
    trained = set(itertools.chain(*ids(take(made, count=150))))
    kept = list(made.held_out(rows=2))
    evaluated = list(itertools.chain(*ids(kept)))
    assert sorted(evaluated) == sorted(
        f"r-{n}" for n in range(sum(UNITS)) if is_held_out(f"r-{n}", fraction=0.3)
    )
    assert trained == {f"r-{number}" for number in range(sum(UNITS))} - set(evaluated)
    for batch in kept:
        assert len(batch) <= 2
        assert len({shape_of(int(row_id.removeprefix("r-"))) for row_id in batch.ids}) == 1
    assert len(list(itertools.chain(*ids(made.held_out(rows=2, limit=3))))) == 3


def test_a_table_says_which_loader_it_needs(latents):
    counts = count_training_rows(latents, held_out=0.0)
    assert [sum(count.values()) for count in counts] == [file.rows for file in latents.units]
    asked = {"columns": ("latent",), "global_batch": 3, "seed": 0, "settings": LoaderSettings()}
    assert isinstance(make_loader(latents, counts=counts, **asked), BucketLoader)
    assert isinstance(make_loader(latents, counts=[6, 5, 6, 5], **asked), BatchLoader)
    with pytest.raises(ValueError, match="no rows to train on"):
        make_loader(latents, counts=[{}, {}], **asked)


def test_targets_in_buckets_come_as_branches_of_one_shape_each(targets):
    def guided(step: int) -> bool:
        return step % 3 == 1

    def made():
        return BranchLoader(
            targets,
            guided=guided,
            global_batch=4,
            seed=0,
            settings=LoaderSettings(window_units=2, held_out=0.2),
            counts=count_training_rows(targets, held_out=0.2),
        )

    whole = take(made(), count=24)
    shapes = set()
    for step, batch in enumerate(whole):
        assert ("w" in batch.columns) == guided(step)
        assert batch["latent"].shape == batch["x_target"].shape
        shapes.add(tuple(batch["latent"].shape[2:]))
    assert len(shapes) > 2
    assert ids(take(made(), start=7, count=9)) == ids(whole)[7:16]
    halves = [ids(take(made(), rank=rank, world=2)) for rank in range(2)]
    joined = [sorted(first + second) for first, second in zip(*halves, strict=True)]
    assert joined == [sorted(batch) for batch in ids(whole)[:20]]
    for branch in (True, False):
        kept = list(made().held_out(guided=branch, rows=3))
        assert all(("w" in batch.columns) == branch for batch in kept)
        assert not {row for batch in kept for row in batch.ids} & {
            row for batch in whole for row in batch.ids
        }
