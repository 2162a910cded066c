"""The batches of a table whose rows have one shape, and the order and prefetching behind them."""

import itertools
import threading
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
import torch
from memory_table import MemoryTable, ids, take

from pipelines.loading.loader import BatchLoader, count_trainable, is_held_out
from pipelines.loading.order import RowOrder, permutation, rank_share
from pipelines.loading.prefetch import Prefetcher
from pipelines.loading.rows import LoaderError, to_batch
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


def table_of(sizes=SIZES):
    ends = itertools.accumulate(sizes)
    units = [[row(f"r-{n}") for n in range(end - size, end)] for size, end in zip(sizes, ends, strict=True)]
    tables = (pa.Table.from_pylist(rows, schema=SCHEMA) for rows in units)
    return MemoryTable({f"u{index:03d}": table for index, table in enumerate(tables)})


def loader(table=None, *, window_units=3, held_out=0.0, lanes=1, **options):
    options = {"global_batch": 6, "seed": 0, "columns": ("noise_key",), **options}
    settings = LoaderSettings(window_units=window_units, held_out=held_out, lanes=lanes)
    return BatchLoader(table or table_of(), settings=settings, **options)


@pytest.mark.parametrize(("window_units", "most"), [(4, 64), (16, 128)])
def test_ranks_read_few_files(window_units, most):
    """Of batches larger than a window, and of windows larger than a batch."""
    read = 0
    for rank in range(8):
        table = table_of(sizes=(8,) * 32)
        share = ids(loader(table, global_batch=64, window_units=window_units), rank=rank, world=8, count=4)
        assert len(set(itertools.chain(*share))) == 32
        read += len(table.read)
    # 32 files in an epoch, and some read ahead, more on a busy machine; 256 and more if each rank read all.
    assert read < most


def test_restart_reads_nothing_before_its_position():
    table = table_of()
    # Not by `batches`, whose thread reads on until it is closed.
    next(loader(table).stream(3))
    # Its own batch, a window of 14 rows in the mean, and the rest of a batch.
    ahead = next(RowOrder(SIZES, window_units=3, seed=0).batches(3 * 6, rows=4 * 6))
    assert table.read
    assert set(table.read) <= {f"u{unit:03d}" for unit in ahead["unit"]}


@pytest.mark.parametrize("held_out", [0.0, 0.3])
def test_every_row_comes_once_an_epoch(held_out):
    made = loader(global_batch=1, held_out=held_out)
    rows = sum(count_trainable(table_of(), held_out=held_out))
    seen = [batch for (batch,) in ids(made, count=3 * rows)]
    epochs = [seen[:rows], seen[rows : 2 * rows], seen[2 * rows :]]
    expected = {f"r-{number}" for number in range(40) if not is_held_out(f"r-{number}", fraction=held_out)}
    assert [set(epoch) for epoch in epochs] == [expected] * 3
    assert epochs[0] != epochs[1] != epochs[2]


def test_batches_span_windows_and_epochs():
    assert set(Counter(itertools.chain(*ids(loader(global_batch=32), count=5))).values()) == {4}
    (large,) = ids(loader(global_batch=80), count=1)
    assert set(Counter(large).values()) == {2}


def test_held_out_rows_are_only_evaluated():
    made = loader(held_out=0.25)
    trained = set(itertools.chain(*ids(made, count=30)))
    evaluated = [row_id for batch in made.held_out(rows=4) for row_id in batch.ids]
    assert evaluated == [f"r-{n}" for n in range(40) if is_held_out(f"r-{n}", fraction=0.25)]
    assert 0 < len(evaluated) < 20
    assert not trained & set(evaluated)
    assert len(trained) + len(evaluated) == 40
    assert [row_id for batch in made.held_out(rows=4, limit=3) for row_id in batch.ids] == evaluated[:3]


def test_held_out_fraction_is_close_to_its_setting():
    assert 0.18 < sum(is_held_out(f"row {number}", fraction=0.2) for number in range(5000)) / 5000 < 0.22
    assert not is_held_out("row", fraction=0.0)


def test_two_windows_are_in_memory():
    table = table_of(sizes=(4,) * 40)
    batches = loader(table, window_units=2, global_batch=4).batches(0, depth=1)
    for _ in range(6):
        next(batches)
    batches.close()
    # 6 yielded, 1 ready, 1 being decoded: 8 units begun, their window, and the next window.
    assert len(table.read) <= 12


def test_arrays_images_and_numbers_are_decoded():
    (batch,) = take(loader(columns=("latent", "image", "token_ids", "noise_key", "draw")), count=1)
    number = int(batch.ids[2].split("-")[1])
    assert (batch["latent"].shape, batch["latent"].dtype) == ((6, 4, 2, 2), torch.float32)
    assert (batch["image"].shape, batch["image"].dtype) == ((6, 3, 8, 8), torch.uint8)
    assert (batch["token_ids"].shape, batch["token_ids"].dtype) == ((6, 3), torch.int64)
    assert batch["noise_key"].dtype == torch.int64
    assert float(batch["latent"][2, 0, 0, 0]) == number / 8
    assert int(batch["image"][2, 0, 0, 0]) == int(batch["token_ids"][2, 0]) == number


@pytest.mark.parametrize(
    ("column", "value", "named"),
    [
        ("image", None, "row r-2 has no image"),
        ("image", b"not an image", "column image of rows r-1 .. r-2"),
        ("latent", b"\0" * 5, "column latent of rows r-1 .. r-2: row 1 has 5 bytes"),
    ],
)
def test_undecodable_row_is_named(column, value, named):
    rows = pa.Table.from_pylist([row("r-1"), {**row("r-2"), column: value}], schema=SCHEMA)
    with pytest.raises(LoaderError, match=named):
        to_batch(rows.select(["id", column]))


def test_file_changed_since_counting_is_refused():
    table = table_of()
    made = loader(table)
    table.tables = {name: rows.slice(0, max(rows.num_rows - 1, 0)) for name, rows in table.tables.items()}
    with pytest.raises(LoaderError, match="the file was changed"):
        take(made, count=1)


def test_counts_can_be_passed_on():
    counts = count_trainable(table_of(), held_out=0.3)
    assert ids(loader(held_out=0.3, counts=counts)) == ids(loader(held_out=0.3))
    assert counts != list(SIZES)


def test_table_without_rows_is_refused():
    with pytest.raises(ValueError, match="no rows to train on"):
        loader(table_of(sizes=()))


def test_shares_partition_a_batch_by_file():
    batch = next(RowOrder(SIZES, window_units=3, seed=0).batches(0, rows=10))
    shares = [rank_share(batch, rank=rank, world=4) for rank in range(4)]
    assert [len(share) for share in shares] == [2, 3, 2, 3]
    assert sorted(map(tuple, np.concatenate(shares))) == sorted(map(tuple, batch))
    files = [set(map(tuple, share[["window", "turn"]])) for share in shares]
    assert sum(map(len, files)) <= len(set().union(*files)) + 3
    assert rank_share(batch, rank=0, world=1) is batch


def test_permutation_never_changes():
    assert sorted(permutation(5, 50)) == list(range(50))
    assert permutation(5, 8).tolist() == [2, 4, 3, 1, 5, 0, 6, 7]


def test_prefetcher_passes_items_errors_and_end():
    assert list(Prefetcher(iter([1, 2, 3]), depth=2)) == [1, 2, 3]

    def failing():
        yield 1
        raise LoaderError("row 2 is torn")

    items = Prefetcher(failing(), depth=2)
    assert next(items) == 1
    with pytest.raises(LoaderError, match="row 2"):
        next(items)
    with pytest.raises(StopIteration):
        next(items)


def test_closed_prefetcher_ends_its_thread():
    before = set(threading.enumerate())
    items = Prefetcher(itertools.count(), depth=3)
    next(items)
    assert {thread.name for thread in set(threading.enumerate()) - before} == {"prefetch_0"}
    items.close()
    assert set(threading.enumerate()) <= before
    with pytest.raises(StopIteration):
        next(items)
