"""The loader: one sequence of batches, whoever reads it, from wherever it is begun."""

import itertools
import threading
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipelines.loading.loader import BatchLoader, LoaderError, count_trainable, is_held_out, to_batch
from pipelines.loading.order import RowOrder, permutation, rank_share
from pipelines.loading.prefetch import Prefetcher
from pipelines.loading.settings import LoaderSettings
from pipelines.tables.schemas import pairs_schema, to_png

SCHEMA = pairs_schema(latent_shape=(4, 2, 2), num_tokens=3)
SIZES = (7, 5, 9, 1, 6, 8, 4)


def row(row_id):
    number = int(row_id.split("-")[1])
    return {
        "id": row_id,
        "source_id": f"s{number}",
        "caption": "a circle",
        "token_ids": np.full(3, number, "<i4").tobytes(),
        "noise_key": number,
        "draw": 0,
        "latent": np.full((4, 2, 2), number / 8, "<f2").tobytes(),
        "image": to_png(np.full((8, 8, 3), number, np.uint8)),
    }


class Units:
    """A table in memory that remembers which units were read."""

    def __init__(self, sizes=SIZES):
        numbers = itertools.count()
        self.tables = [
            pa.Table.from_pylist([row(f"r-{next(numbers)}") for _ in range(size)], schema=SCHEMA)
            for size in sizes
        ]
        self.units = [
            SimpleNamespace(unit=f"u{index}", path=f"u{index}.parquet", rows=size, index=index)
            for index, size in enumerate(sizes)
        ]
        self.read = []

    def read_unit(self, unit, columns=None):
        if columns != ["id"]:
            self.read.append(unit.index)
        return self.tables[unit.index].select(columns)


def loader(table=None, *, global_batch=6, seed=0, columns=("noise_key",), **settings):
    return BatchLoader(
        table or Units(),
        columns=columns,
        global_batch=global_batch,
        seed=seed,
        settings=LoaderSettings(**{"window_units": 3, **settings}),
    )


def ids_of(made, *, start=0, count=12, rank=0, world=1):
    batches = made.batches(start, rank=rank, world=world)
    try:
        return [batch.ids for batch in itertools.islice(batches, count)]
    finally:
        batches.close()


@pytest.mark.parametrize("world", [1, 2, 4])
def test_batches_do_not_depend_on_the_number_of_workers(world):
    shares = [ids_of(loader(), rank=rank, world=world) for rank in range(world)]
    joined = [Counter(itertools.chain(*parts)) for parts in zip(*shares, strict=True)]
    assert joined == [Counter(ids) for ids in ids_of(loader())]


@pytest.mark.parametrize("window_units", [4, 16])
def test_workers_read_their_share_of_the_files(window_units):
    """Of batches that are larger than a window, and of windows that are larger than a batch."""
    read = []
    for rank in range(8):
        table = Units(sizes=(8,) * 32)
        made = loader(table, global_batch=64, window_units=window_units)
        assert len(set(itertools.chain(*ids_of(made, rank=rank, world=8, count=4)))) == 32
        read.append(len(table.read))
    # An epoch of 32 files, and what is read ahead; 256 and more if each worker reads all.

    assert sum(read) < (50 if window_units == 4 else 120)


@pytest.mark.parametrize("start", [1, 5, 6, 7, 11])
def test_order_does_not_depend_on_a_restart(start):
    assert ids_of(loader(), start=start, count=4) == ids_of(loader(), count=15)[start : start + 4]


def test_seek_reads_nothing_of_what_was_before():
    table = Units()
    ids_of(loader(table), start=3, count=1)
    order = RowOrder(SIZES, window_units=3, seed=0)
    windows = list(itertools.islice(order.windows(3 * 6), 50))
    assert windows[0].start <= 18 < windows[0].stop
    allowed = [index for window in windows[:3] for index in window.units]
    first = set(windows[0].row_indices(np.array(SIZES))[18 - windows[0].start :, 1].tolist())
    assert table.read
    assert set(table.read) <= first | set(allowed[3:])


@pytest.mark.parametrize("held_out", [0.0, 0.3])
def test_every_row_comes_once_an_epoch(held_out):
    made = loader(global_batch=1, held_out=held_out)
    rows = made.rows_per_epoch
    seen = [ids for (ids,) in ids_of(made, count=3 * rows)]
    epochs = [seen[:rows], seen[rows : 2 * rows], seen[2 * rows :]]
    expected = {f"r-{number}" for number in range(40) if not is_held_out(f"r-{number}", fraction=held_out)}
    assert [set(epoch) for epoch in epochs] == [expected] * 3
    assert epochs[0] != epochs[1] != epochs[2]


def test_batches_run_over_windows_and_epochs_without_a_seam():
    seen = list(itertools.chain(*ids_of(loader(global_batch=32), count=5)))
    assert set(Counter(seen).values()) == {4}
    (large,) = ids_of(loader(global_batch=80), count=1)
    assert set(Counter(large).values()) == {2}


def test_another_seed_gives_another_order():
    assert ids_of(loader(seed=1)) != ids_of(loader())


def test_held_out_rows_are_never_trained_on_and_all_evaluated():
    made = loader(held_out=0.25)
    trained = set(itertools.chain(*ids_of(made, count=30)))
    evaluated = [row_id for batch in made.held_out(rows=4) for row_id in batch.ids]
    assert evaluated == [f"r-{n}" for n in range(40) if is_held_out(f"r-{n}", fraction=0.25)]
    assert 0 < len(evaluated) < 20
    assert not trained & set(evaluated)
    assert len(trained) + len(evaluated) == 40
    limited = [row_id for batch in made.held_out(rows=4, limit=3) for row_id in batch.ids]
    assert limited == evaluated[:3]


def test_held_out_fraction_is_close_to_what_was_asked():
    kept = sum(is_held_out(f"row {number}", fraction=0.2) for number in range(5000))
    assert 0.18 < kept / 5000 < 0.22
    assert not is_held_out("row", fraction=0.0)


def test_memory_holds_two_windows_and_no_more():
    table = Units(sizes=(4,) * 40)
    batches = loader(table, window_units=2, global_batch=4).batches(0, depth=1)
    for _ in range(6):
        next(batches)
    batches.close()
    # 6 taken, 1 waiting, 1 in the making: 8 units begun, their window, and the next window.
    assert len(table.read) <= 12


def test_decodes_arrays_images_and_numbers():
    batches = loader(columns=("latent", "image", "token_ids", "noise_key", "draw")).batches(0)
    batch = next(batches)
    batches.close()
    number = int(batch.ids[2].split("-")[1])
    assert (batch["latent"].shape, batch["latent"].dtype) == ((6, 4, 2, 2), torch.float32)
    assert (batch["image"].shape, batch["image"].dtype) == ((6, 3, 8, 8), torch.uint8)
    assert (batch["token_ids"].shape, batch["token_ids"].dtype) == ((6, 3), torch.int64)
    assert batch["noise_key"].dtype == torch.int64
    assert float(batch["latent"][2, 0, 0, 0]) == number / 8
    assert int(batch["image"][2, 0, 0, 0]) == int(batch["token_ids"][2, 0]) == number


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("image", None, "row r-2 has no image"),
        ("image", b"not a picture", "column image of rows r-1 .. r-2"),
        ("latent", b"\0" * 5, "column latent of rows r-1 .. r-2: row 1 has 5 bytes"),
    ],
)
def test_a_row_that_cannot_be_decoded_is_named(column, value, said):
    rows = pa.Table.from_pylist([row("r-1"), {**row("r-2"), column: value}], schema=SCHEMA)
    with pytest.raises(LoaderError, match=said):
        to_batch(rows.select(["id", column]))


def test_a_file_that_changed_since_it_was_counted_is_noticed():
    table = Units()
    made = loader(table)
    table.tables = [rows.slice(0, max(rows.num_rows - 1, 0)) for rows in table.tables]
    with pytest.raises(LoaderError, match="the file was changed"):
        ids_of(made, count=1)


def test_counts_can_be_taken_once_and_handed_on():
    counts = count_trainable(Units(), held_out=0.3)
    made = BatchLoader(
        Units(),
        columns=("noise_key",),
        global_batch=6,
        seed=0,
        settings=LoaderSettings(window_units=3, held_out=0.3),
        counts=counts,
    )
    assert ids_of(made) == ids_of(loader(held_out=0.3))
    assert counts != list(SIZES)


def test_a_table_with_nothing_to_train_on_is_refused():
    with pytest.raises(ValueError, match="no rows to train on"):
        loader(Units(sizes=()))


def test_shares_are_whole_and_of_few_files():
    batch = next(RowOrder(SIZES, window_units=3, seed=0).batches(0, rows=10))
    parts = [rank_share(batch, rank=rank, world=4) for rank in range(4)]
    assert [len(part) for part in parts] == [2, 3, 2, 3]
    assert sorted(map(tuple, np.concatenate(parts))) == sorted(map(tuple, batch))
    files = [set(map(tuple, part[:, :2])) for part in parts]
    assert sum(map(len, files)) <= len(set().union(*files)) + 3
    assert rank_share(batch, rank=0, world=1) is batch


def test_shuffle_is_a_permutation_that_never_changes():
    assert sorted(permutation(5, 50)) == list(range(50))
    assert permutation(5, 8).tolist() == [2, 4, 3, 1, 5, 0, 6, 7]


def test_prefetch_hands_on_items_errors_and_the_end():
    assert list(Prefetcher(iter([1, 2, 3]), depth=2)) == [1, 2, 3]

    def broken():
        yield 1
        raise LoaderError("row 2 is torn")

    items = Prefetcher(broken(), depth=2)
    assert next(items) == 1
    with pytest.raises(LoaderError, match="row 2"):
        next(items)
    with pytest.raises(StopIteration):
        next(items)


def test_closing_ends_the_thread():
    items = Prefetcher(itertools.count(), depth=3)
    next(items)
    items.close()
    assert not any(thread.name == "prefetch" for thread in threading.enumerate())
