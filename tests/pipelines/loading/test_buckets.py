"""Batches of one shape from a table whose rows differ in shape."""

import itertools
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from memory_table import MemoryTable, ids, take

from pipelines.loading.buckets import BucketLoader, count_by_shape
from pipelines.loading.loader import is_held_out
from pipelines.loading.settings import LoaderSettings
from pipelines.tables.schemas import latents_schema

SCHEMA = latents_schema(latent_shape=(4, 8, 8), num_tokens=3, cell=2)
SIZES = (9, 4, 12, 7, 1)
ROWS = sum(SIZES)
WIDE, TALL, SQUARE = (8, 24), (24, 8), (16, 16)


def shape_of(number: int):
    """Of ten rows seven are square, two wide and one tall."""
    return (SQUARE, WIDE, SQUARE, SQUARE, TALL, SQUARE, WIDE, SQUARE, SQUARE, SQUARE)[number % 10]


def number_of(row_id: str) -> int:
    return int(row_id.removeprefix("r-"))


def row(number: int) -> dict:
    height, width = shape_of(number)
    return {
        "id": f"r-{number}",
        "source_id": "o",
        "caption": "a",
        "token_ids": np.full(3, number, "<i4").tobytes(),
        "latent": np.full((4, height // 2, width // 2), number / 8, "<f2").tobytes(),
        "height": height,
        "width": width,
    }


def loader(*, global_batch=4, seed=0, held_out=0.0):
    rows = map(row, itertools.count())
    units = [list(itertools.islice(rows, size)) for size in SIZES]
    tables = (pa.Table.from_pylist(unit, schema=SCHEMA) for unit in units)
    table = MemoryTable({f"u{index}": rows for index, rows in enumerate(tables)})
    settings, counts = (
        LoaderSettings(window_units=2, held_out=held_out),
        count_by_shape(table, held_out=held_out),
    )
    options = {"columns": ("latent", "token_ids"), "global_batch": global_batch, "settings": settings}
    return BucketLoader(table, seed=seed, counts=counts, **options)


def test_all_rows_of_a_step_have_one_shape():
    made = loader()
    for step, batch in enumerate(take(made, count=60)):
        height, width = made.key_at(step)
        assert batch["latent"].shape == (4, 4, height // 2, width // 2)
        for row_id, latent, tokens in zip(batch.ids, batch["latent"], batch["token_ids"], strict=True):
            number = number_of(row_id)
            assert shape_of(number) == (height, width)
            assert (latent == number / 8).all()
            assert (tokens == number).all()
    assert {made.key_at(step) for step in range(60)} == {SQUARE, WIDE, TALL}


def test_each_bucket_yields_rows_once_an_epoch():
    made = loader(global_batch=3)
    batches = ids(made, count=300)
    for shape, rows in Counter(map(shape_of, range(ROWS))).items():
        seen = list(
            itertools.chain(*(batch for step, batch in enumerate(batches) if made.key_at(step) == shape))
        )
        epochs = [seen[start : start + rows] for start in range(0, 3 * rows, rows)]
        assert all(len(set(epoch)) == rows for epoch in epochs)
        assert set(map(number_of, epochs[0])) == {n for n in range(ROWS) if shape_of(n) == shape}


def test_buckets_are_drawn_in_proportion_to_rows():
    made = loader()
    counts = Counter(made.key_at(step) for step in range(4_000))
    for shape, rows in Counter(map(shape_of, range(ROWS))).items():
        assert counts[shape] / 4_000 == pytest.approx(rows / ROWS, abs=0.03)


def test_bucket_smaller_than_a_batch_repeats_rows():
    made = loader(global_batch=8)
    step = next(step for step in range(200) if made.key_at(step) == TALL)
    (batch,) = ids(made, start=step, count=1)
    tall = [number for number in range(ROWS) if shape_of(number) == TALL]
    assert len(tall) == 3
    assert set(map(number_of, batch)) == set(tall)
    assert set(Counter(batch).values()) == {2, 3}


def test_held_out_rows_are_only_evaluated():
    made = loader(held_out=0.3)
    trained = set(itertools.chain(*ids(made, count=150)))
    batches = [batch.ids for batch in made.held_out(rows=2)]
    evaluated = set(itertools.chain(*batches))
    assert evaluated == {f"r-{n}" for n in range(ROWS) if is_held_out(f"r-{n}", fraction=0.3)}
    assert trained == {f"r-{number}" for number in range(ROWS)} - evaluated
    assert all(len({shape_of(number_of(row_id)) for row_id in batch}) == 1 for batch in batches)
    assert max(map(len, batches)) <= 2
    assert sum(map(len, made.held_out(rows=2, limit=3))) == 3
