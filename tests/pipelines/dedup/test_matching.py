"""Copies are found as by comparing every row with every earlier one, whatever order rows arrive in."""

from functools import partial

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shuffled_rows import ShuffledRows

from pipelines.dedup import matching
from pipelines.dedup.matching import REASON_ORDER, BlockIndex, RankBounds
from pipelines.dedup.settings import CAPTION, IMAGE, URL

PARTS = 3
seeds = st.integers(0, 2**32 - 1)


def generator(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))


def as_rows(table: pa.Table) -> dict[int, tuple[str, int]]:
    """The entry of `MATCHES` for each rank; each has one match."""
    rows = table.to_pylist()
    found = {row["rank"]: (REASON_ORDER[row["reason"]], row["of"]) for row in rows}
    assert len(found) == len(rows)
    return found


def whole(rows: ShuffledRows) -> pa.Table:
    return pa.concat_tables([matching.MATCHES.empty_table(), *rows.tables()])


# ---- exact keys


@settings(deadline=None)
@given(seeds)
def test_duplicate_has_its_first_reason(seed):
    draw = generator(seed)
    count = int(draw.integers(1, 60))
    # Few values, so that there are copies; -1 stands for a key that is not there.
    keys = {kind: draw.integers(-1, 12, count) for kind in (URL, IMAGE, CAPTION)}
    bounds = RankBounds(
        evaluation_end=int(draw.integers(0, count + 1)), new_begin=int(draw.integers(0, count + 1))
    )
    kinds = frozenset(kind for kind in keys if draw.random() < 0.6)
    tables = [
        matching.exact_key_table(
            kind, value[value >= 0].astype(np.int64), np.flatnonzero(value >= 0), parts=PARTS
        )
        for kind, value in keys.items()
    ]
    rows = ShuffledRows(tables, seed=seed)
    found = rows.grouped(partial(matching.exact_matches, bounds=bounds, kinds=kinds), by="part")
    assert as_rows(matching.first_reasons(whole(found))) == by_comparing(keys, bounds, kinds)


def by_comparing(keys, bounds: RankBounds, kinds) -> dict[int, tuple[str, int]]:
    names = {
        URL: ("evaluation_image", "duplicate_url"),
        IMAGE: ("evaluation_image", "duplicate_image"),
        CAPTION: ("evaluation_caption", "duplicate_caption"),
    }
    found = {}
    for rank in range(bounds.new_begin, len(keys[URL])):
        reasons = []
        for kind, values in keys.items():
            same = [of for of in range(rank) if values[rank] >= 0 and values[of] == values[rank]]
            if same and same[0] < bounds.evaluation_end:
                reasons.append((REASON_ORDER.index(names[kind][0]), same[0]))
            elif same and kind in kinds:
                reasons.append((REASON_ORDER.index(names[kind][1]), same[0]))
        if reasons:
            reason, of = min(reasons)
            found[rank] = (REASON_ORDER[reason], of)
    return found


@pytest.mark.parametrize("step", [1, 2**20, 2**52])
def test_keys_are_spread_over_groups(step):
    keys = np.arange(4096).astype(np.uint64) * np.uint64(step)
    assert np.bincount(matching.partition_of(keys.view(np.int64), parts=8), minlength=8).min() > 400
    assert matching.partition_of(np.array([0, 1, -1]), parts=1000).tolist() == [0, 789, 67]


def test_empty_table_has_no_duplicates():
    nothing, bounds = matching.EXACT_KEYS.empty_table(), RankBounds(evaluation_end=0, new_begin=0)
    assert matching.exact_matches(nothing, bounds=bounds, kinds=frozenset([URL])).num_rows == 0


# ---- perceptual hashes


def planted(draw: np.random.Generator, *, count: int) -> np.ndarray:
    """Random hashes, and hashes a few bits beside them, in chains too: int64 [count]."""
    hashes = [int(draw.integers(0, 2**64, dtype=np.uint64))]
    while len(hashes) < count:
        if draw.random() < 0.6:
            near = hashes[int(draw.integers(len(hashes)))]
            for bit in draw.integers(0, 64, int(draw.integers(0, 6))):
                near ^= 1 << int(bit)
            hashes.append(near)
        else:
            hashes.append(int(draw.integers(0, 2**64, dtype=np.uint64)))
    return np.array(hashes, np.uint64).view(np.int64)


def found_near(
    hashes: np.ndarray, index: BlockIndex, bounds: RankBounds, *, seed: int
) -> dict[int, tuple[str, int]]:
    """The three groupings, on shuffled rows."""
    ranks = np.arange(len(hashes))
    table = matching.phash_table(hashes, ranks, near=np.zeros(len(hashes), bool), parts=PARTS)
    rows = ShuffledRows([table], seed=seed)
    if index.max_hamming:
        blocks = rows.grouped(partial(matching.phash_blocks, index=index, parts=PARTS), by="part")
        rows = rows.union(blocks.grouped(partial(matching.near_phashes, index=index, parts=PARTS), by="part"))
    return as_rows(whole(rows.grouped(partial(matching.near_matches, bounds=bounds), by="part")))


def near_by_comparing(hashes: np.ndarray, max_hamming: int, bounds: RankBounds) -> dict[int, tuple[str, int]]:
    bits = hashes.view(np.uint64)
    found = {}
    for rank in range(bounds.new_begin, len(bits)):
        near = np.flatnonzero(np.bitwise_count(bits[:rank] ^ bits[rank]) <= max_hamming)
        if len(near):
            reason = "evaluation_image" if near[0] < bounds.evaluation_end else "near_duplicate_image"
            found[rank] = (reason, int(near[0]))
    return found


@settings(max_examples=60, deadline=None)
@given(seeds, st.integers(0, 8), st.integers(1, 3))
def test_block_index_equals_comparing_all_pairs(seed, max_hamming, more):
    draw = generator(seed)
    hashes = planted(draw, count=int(draw.integers(1, 80)))
    bounds = RankBounds(evaluation_end=int(draw.integers(0, 10)), new_begin=int(draw.integers(0, 40)))
    index = BlockIndex(max_hamming=max_hamming, blocks=max_hamming + more)
    assert found_near(hashes, index, bounds, seed=seed) == near_by_comparing(hashes, max_hamming, bounds)


@pytest.mark.parametrize("blocks", [5, 6])
def test_block_index_equals_comparing_thousands(blocks):
    hashes = planted(generator(5), count=4000)
    bounds = RankBounds(evaluation_end=50, new_begin=1000)
    index = BlockIndex(max_hamming=4, blocks=blocks)
    assert found_near(hashes, index, bounds, seed=1) == near_by_comparing(hashes, 4, bounds)


def test_group_of_thousands_is_searched():
    # All in the same blocks but one: the worst that images can do to an index.
    hashes = np.arange(3000, dtype=np.int64)
    index = BlockIndex(max_hamming=2, blocks=4)
    bounds = RankBounds(evaluation_end=0, new_begin=0)
    assert found_near(hashes, index, bounds, seed=2) == near_by_comparing(hashes, 2, bounds)


@settings(deadline=None)
@given(st.integers(1, 10**11), st.integers(0, 8))
def test_index_has_the_choices_and_bits(rows, max_hamming):
    index = BlockIndex.for_rows(rows, max_hamming=max_hamming)
    assert len(index.masks) == len(index) == len(set(index.masks))
    kept = index.blocks - max_hamming
    assert min(mask.bit_count() for mask in index.masks) >= kept * (64 // index.blocks)
    assert len(index) <= 43_758
