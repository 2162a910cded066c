"""The order of rows in lanes: every row once an epoch, and each unit read by one rank."""

import hashlib
import itertools

import numpy as np
import pytest
import torch
from memory_table import take
from test_loader import loader, table_of

from pipelines.loading.lanes import Lanes
from pipelines.loading.order import RowOrder, rank_share

SIZES = (7, 5, 0, 9, 1, 6, 8, 4, 0, 3, 11, 2)
GOLDEN = "43b7353b9b0a721c908e280741a3fb3277de12a14349daa1e7de5197702f111a"


def order_of(sizes=SIZES, *, lanes, window_units=3):
    return RowOrder(sizes, window_units=window_units, seed=0, lanes=lanes)


def rows_of(order: RowOrder, *, count: int, position: int = 0) -> np.ndarray:
    return np.concatenate(list(itertools.islice(order.batches(position, rows=1), count)))


def units_read(order: RowOrder, *, ranks: int, batch: int, steps: int) -> int:
    """Files that ranks open, each once a window."""
    read = set()
    for rows in itertools.islice(order.batches(0, rows=batch), steps):
        for rank in range(ranks):
            share = rank_share(rows, rank=rank, world=ranks)
            read |= {(rank, *file) for file in share[["window", "turn"]].tolist()}
    return len(read)


def test_one_lane_is_the_order_of_version_0_1():
    """The digest is that of unit and row of its first three epochs."""
    rows = rows_of(order_of((7, 5, 9, 1, 6, 8, 4), lanes=1), count=120)
    pairs = np.stack([rows["unit"], rows["row"]], axis=1).astype("<i8")
    assert hashlib.sha256(pairs.tobytes()).hexdigest() == GOLDEN


@pytest.mark.parametrize("lanes", [2, 3, 8, 32])
@pytest.mark.parametrize("span_windows", [1, 64])
def test_every_row_comes_once_an_epoch(lanes, span_windows, monkeypatch):
    monkeypatch.setattr("pipelines.loading.order.SPAN_WINDOWS", span_windows)
    total = sum(SIZES)
    rows = rows_of(order_of(lanes=lanes), count=2 * total)
    every = {(unit, row) for unit, size in enumerate(SIZES) for row in range(size)}
    for epoch in (rows[:total], rows[total:]):
        assert set(epoch[["unit", "row"]].tolist()) == every
    for start in (1, total - 1, total + 5):
        again = rows_of(order_of(lanes=lanes), position=start, count=20)
        assert np.array_equal(again, rows[start : start + 20])
    # No row of a window comes once its files are gone.
    assert (rows["until"] > np.arange(2 * total)).all()


def test_lanes_give_equally_many_rows():
    lanes = Lanes(np.array([5, 2, 9, 1, 1, 4]), lanes=4)
    lane, window, number = lanes.rows_at(0, lanes.rows)
    assert np.bincount(lane).tolist() == [6, 6, 5, 5]
    assert sorted(zip(window.tolist(), number.tolist(), strict=True)) == [
        (window, number) for window, size in enumerate((5, 2, 9, 1, 1, 4)) for number in range(size)
    ]


@pytest.mark.parametrize(("ranks", "most"), [(1, 1.06), (16, 1.3), (24, 1.5), (64, 1.3)])
def test_ranks_share_no_unit(ranks, most):
    """24 ranks do not divide 64 lanes: where a share ends within a lane, two read its units."""
    sizes = np.random.Generator(np.random.Philox(0)).integers(24, 41, 256)
    steps = int(sizes.sum()) // 512
    read = units_read(order_of(sizes, lanes=64), ranks=ranks, batch=512, steps=steps)
    assert read / len(sizes) <= most
    before = units_read(order_of(sizes, lanes=1, window_units=8), ranks=ranks, batch=512, steps=steps)
    assert ranks == 1 or before > 1.5 * read


def test_shares_of_any_number_of_workers_are_the_same_batches():
    options = {"columns": ("latent", "token_ids", "noise_key"), "global_batch": 128, "lanes": 64}
    sizes = (5, 4, 6, 7, 3) * 10

    def batches(*, rank, world):
        return take(loader(table_of(sizes), **options), rank=rank, world=world, count=3)

    whole = batches(rank=0, world=1)
    for world in (2, 8, 64):
        shares = [batches(rank=rank, world=world) for rank in range(world)]
        for batch, parts in zip(whole, zip(*shares, strict=True), strict=True):
            assert tuple(itertools.chain(*(part.ids for part in parts))) == batch.ids
            for name, column in batch.columns.items():
                assert torch.equal(torch.cat([part[name] for part in parts]), column)


def test_units_of_a_window_of_each_lane_are_in_memory():
    table = table_of(sizes=(4,) * 60)
    batches = loader(table, window_units=8, lanes=8, global_batch=8).batches(0, depth=1)
    for _ in range(6):
        next(batches)
    batches.close()
    # 8 batches of 8 rows begun: 16 units, and those of the next window of each lane.
    assert len(table.read) <= 16 + 8 + 8


def read_over_used(*, units: int, lanes: int, ranks: int, batch: int = 2048) -> float:
    """Rows of the files that ranks read in an epoch, over the rows that they use."""
    sizes = np.random.Generator(np.random.Philox(units)).integers(96, 129, units)
    order = order_of(sizes, lanes=lanes, window_units=8)
    rank = np.searchsorted(
        [batch * (one + 1) // ranks for one in range(ranks)], np.arange(batch), side="right"
    )
    read, steps = {}, int(sizes.sum()) // batch
    for rows in itertools.islice(order.batches(0, rows=batch), steps):
        # The shares of `rank_share` one after the other.
        shares = rows[np.lexsort((rows["turn"], rows["window"], rows["lane"]))] if ranks > 1 else rows
        files = zip(rank, shares["window"], shares["turn"], shares["unit"], strict=True)
        read |= {(one, window, turn): unit for one, window, turn, unit in files}
    return sum(sizes[list(read.values())]) / (steps * batch)


@pytest.mark.slow
def test_many_workers_read_little_more_than_their_rows(capsys):
    """Figures of docs/training.md: batches of 2,048, units of 96 to 128 rows."""
    with capsys.disabled():
        print("\nrows of files read / rows used, by units of the table (512, 1024, 4096, 16384)")
        for lanes in (1, 256):
            for ranks in (1, 8, 64, 256):
                found = [read_over_used(units=n, lanes=lanes, ranks=ranks) for n in (512, 1024, 4096, 16384)]
                print(f"{lanes} lanes, {ranks} workers: {', '.join(f'{ratio:.2f}' for ratio in found)}")
                assert lanes == 1 or max(found[1:]) <= 1.3
