"""Frames: which shapes there are, which one an image gets, and what is left of it."""

import io
import math
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipelines.stages.crop import bucket_for, buckets_of, crop_box, shapes_of
from pipelines.stages.image import CropImage, EncodedImage, decode_image
from pipelines.stages.settings import Buckets, ImageSettings
from pipelines.tables.schemas import to_png
from snapfusion.settings import SettingsError

SIDES, SMALL_SIDES = st.integers(1, 6_000), st.integers(2, 90)
STEPS = st.sampled_from([4, 16, 64])
CROPS = st.sampled_from(["center", "top", "random"])


def png(height: int, width: int, *, exif: bytes | None = None) -> bytes:
    """An image whose red tells the row and whose green tells the column, both from 0 to 255."""
    rows = np.linspace(0, 255, height)[:, None].repeat(width, axis=1)
    columns = np.linspace(0, 255, width)[None].repeat(height, axis=0)
    pixels = np.stack([rows, columns, np.zeros((height, width))], axis=-1).round().astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", **({} if exif is None else {"exif": exif}))
    return buffer.getvalue()


def frame(data: bytes, *, row: str = "web/0/0", shapes=((32, 32),), **values) -> np.ndarray:
    made = CropImage(settings=ImageSettings(min_side=2, **values), shapes=tuple(shapes))
    return made(EncodedImage(data, row=row))


# Sizes and buckets.


def test_buckets_of_512():
    expected = ((640, 384), (576, 448), (512, 512), (448, 576), (384, 640))
    assert buckets_of(Buckets(), size=512, step=64) == expected


@settings(max_examples=200, deadline=None)
@given(STEPS, st.integers(1, 20), st.floats(1, 6), st.integers(1, 20), st.integers(0, 40))
def test_buckets_keep_their_bounds(step, steps, max_aspect, least, more):
    size = step * steps
    bounds = Buckets(max_aspect=max_aspect, min_side=min(least * step, size), max_side=size + more * step)
    shapes = buckets_of(bounds, size=size, step=step)
    assert (size, size) in shapes
    assert len(set(shapes)) == len(shapes)
    assert set(shapes) == {(width, height) for height, width in shapes}
    assert list(shapes) == sorted(shapes, key=lambda shape: shape[1] / shape[0])
    for height, width in shapes:
        assert height % step == width % step == 0
        assert height * width <= size * size < (min(height, width) + step) * max(height, width)
        assert max(height, width) <= max_aspect * min(height, width)
        assert bounds.min_side <= min(height, width)
        assert max(height, width) <= bounds.max_side


@pytest.mark.parametrize("size", [1, 32, 63, 65, 500, 513])
def test_size_off_the_granularity_is_refused(size):
    with pytest.raises(SettingsError, match=rf"^latents\.images\.size is {size}; multiples of 64"):
        shapes_of(None, size=size, step=64)


def test_refusal_names_the_nearest_sizes():
    with pytest.raises(SettingsError, match="such as 256 and 320"):
        shapes_of(None, size=300, step=64)
    assert shapes_of(None, size=768, step=64) == ((768, 768),)


@pytest.mark.parametrize(
    ("name", "side", "accepted"), [("min_side", 576, "at most"), ("max_side", 448, "at least")]
)
def test_bounds_that_exclude_the_square_are_refused(name, side, accepted):
    message = rf"^latents\.images\.buckets\.{name} is {side}; {accepted} the size, 512"
    with pytest.raises(SettingsError, match=message):
        shapes_of(Buckets(**{name: side}), size=512, step=64)


@settings(max_examples=300, deadline=None)
@given(SIDES, SIDES, st.floats(1, 6))
def test_image_gets_the_bucket_nearest_in_aspect(height, width, max_aspect):
    shapes = buckets_of(Buckets(max_aspect=max_aspect), size=512, step=64)
    chosen = bucket_for(shapes, height=height, width=width)

    def distance(shape):
        return abs(math.log(width / height) - math.log(shape[1] / shape[0]))

    assert distance(chosen) <= min(map(distance, shapes)) + 1e-12
    assert bucket_for(shapes, height=height * 3, width=width * 3) == chosen


def test_taller_of_two_equally_near_buckets_wins():
    shapes = ((128, 64), (64, 64), (64, 128))
    # 1 : sqrt(2) is no ratio of whole numbers; 1 : 1 stands as near to 2 : 1 as to 1 : 2.
    assert bucket_for((shapes[0], shapes[2]), height=77, width=77) == (128, 64)
    assert bucket_for(shapes, height=77, width=77) == (64, 64)


@pytest.mark.parametrize("shape", buckets_of(Buckets(max_aspect=4.0), size=512, step=64))
def test_image_of_a_buckets_size_is_unchanged(shape):
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    shapes = buckets_of(Buckets(max_aspect=4.0), size=512, step=64)
    assert np.array_equal(frame(to_png(pixels), shapes=shapes), pixels)


# Crops.


@settings(max_examples=500, deadline=None)
@given(SIDES, SIDES, SIDES, SIDES, CROPS, st.floats(0, 1, exclude_max=True))
def test_crop_lies_inside_and_has_the_aspect(h, w, height, width, crop, at):
    left, top, right, bottom = crop_box((h, w), height=height, width=width, crop=crop, at=at)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    assert (left, top) == (int(left), int(top))
    assert (right - left) * h == pytest.approx((bottom - top) * w, rel=1e-6)
    assert right - left == pytest.approx(width) or bottom - top == pytest.approx(height)


@settings(max_examples=60, deadline=None)
@given(SMALL_SIDES, SMALL_SIDES, st.sampled_from([(32, 32), (48, 16), (16, 64)]), CROPS)
def test_result_has_the_size_of_its_shape(height, width, shape, crop):
    made = frame(png(height, width), shapes=(shape,), crop=crop)
    assert made.shape == (*shape, 3)
    assert (made.dtype, made.flags.c_contiguous, made.flags.writeable) == (np.uint8, True, True)


@settings(max_examples=60, deadline=None)
@given(SMALL_SIDES, SMALL_SIDES, st.sampled_from([8, 16, 33]))
def test_center_square_is_one_resampling(height, width, size):
    """One resampling of the middle square, in whole pixels."""
    data = png(height, width)
    side = min(height, width)
    left, top = (width - side) // 2, (height - side) // 2
    with Image.open(io.BytesIO(data)) as image:
        box = (left, top, left + side, top + side)
        expected = np.array(image.resize((size, size), Image.Resampling.LANCZOS, box=box))
    assert np.array_equal(decode_image(data, size=size, settings=ImageSettings(min_side=2)), expected)
    assert np.array_equal(frame(data, shapes=((size, size),)), expected)


@pytest.mark.parametrize(
    ("crop", "tall", "wide"), [("center", (63, 191), (63, 191)), ("top", (0, 127), (63, 191))]
)
def test_crop_keeps_center_or_top(crop, tall, wide):
    high = frame(png(256, 128), shapes=((64, 64),), crop=crop)[:, :, 0].astype(int)
    assert (high.min(), high.max()) == pytest.approx(tall, abs=3)
    broad = frame(png(128, 256), shapes=((64, 64),), crop=crop)[:, :, 1].astype(int)
    assert (broad.min(), broad.max()) == pytest.approx(wide, abs=3)


def test_random_crop_follows_from_seed_and_row():
    data = png(400, 40)
    rows = [f"web/00000/{number:07d}" for number in range(40)]
    made = {row: frame(data, row=row, crop="random", crop_seed=1) for row in rows}
    for row in reversed(rows):
        assert np.array_equal(frame(data, row=row, crop="random", crop_seed=1), made[row])
    begins = [int(image[0, 0, 0]) for image in made.values()]
    assert len(set(begins)) > 20
    assert min(begins) < 30
    assert max(begins) > 200  # 230 begins the lowest
    assert not np.array_equal(frame(data, row=rows[0], crop="random", crop_seed=2), made[rows[0]])


def test_random_crop_can_begin_anywhere():
    for at, expected in ((0.0, 0), (0.24, 0), (0.25, 1), (0.75, 3), (0.9999, 3)):
        left, *_ = crop_box((1, 1), height=1, width=4, crop="random", at=at)
        assert left == expected


@pytest.mark.parametrize("sides", [(1_000, 100), (100, 1_000), (2, 3_000), (3_000, 2)])
def test_sliver_gets_the_outermost_bucket(sides):
    shapes = buckets_of(Buckets(), size=32, step=4)
    assert frame(png(*sides), shapes=shapes).shape[:2] == shapes[0 if sides[0] > sides[1] else -1]


def test_bucket_is_chosen_by_the_upright_image():
    turned = Image.Exif()
    turned[0x0112] = 6
    shapes = ((48, 16), (16, 48))
    assert frame(png(20, 60), shapes=shapes).shape == (16, 48, 3)
    upright = frame(png(20, 60, exif=turned.tobytes()), shapes=shapes)
    assert upright.shape == (48, 16, 3)
    # After a quarter turn the columns' values stand in the rows.
    assert upright[0, 8, 1] < 20
    assert upright[-1, 8, 1] > 235


def test_large_image_is_cropped_without_aliasing():
    stripes = np.zeros((600, 1_800, 3), np.uint8)
    stripes[:, ::2] = 255
    made = frame(to_png(stripes), shapes=((16, 48), (32, 32))).astype(int)
    assert made.shape == (16, 48, 3)
    assert np.abs(made[:, 1:-1] - 127).max() <= 1


def test_pickled_image_keeps_its_row():
    sent = pickle.loads(pickle.dumps(EncodedImage(b"bytes", row="web/0/7"), protocol=pickle.HIGHEST_PROTOCOL))
    assert (sent, sent.row) == (b"bytes", "web/0/7")


@pytest.mark.parametrize("size", [256, 512, 768])
def test_document_lists_the_buckets(size):
    text = (Path(__file__).parents[3] / "docs/resolution.md").read_text()
    (row,) = re.findall(rf"^\| {size} \| (.*) \|$", text, re.MULTILINE)
    shapes = buckets_of(Buckets(), size=size, step=64)
    assert row.split(", ") == [f"{width}×{height}" for height, width in shapes]
