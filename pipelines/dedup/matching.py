"""Finds duplicates: functions of Arrow tables, each of which sees all rows of its groups at once.

A row is identified by its rank in one order of all rows, so "earlier" means "of lower rank". Nothing here
depends on the order in which rows or groups arrive.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import pyarrow as pa

from pipelines.dedup.settings import CAPTION, IMAGE, URL

EXACT_KEYS = pa.schema([("part", pa.int32()), ("kind", pa.int8()), ("key", pa.int64()), ("rank", pa.int64())])
"""Exact keys of rows. `part` is the group; rows with one key are in one part."""

PHASHES = pa.schema([("part", pa.int32()), ("phash", pa.int64()), ("rank", pa.int64()), ("near", pa.bool_())])
"""A row's perceptual hash and rank; where `near`, the first rank of a hash within `max_hamming` bits."""

BLOCKS = pa.schema(
    {"part": pa.int32(), "choice": pa.int16(), "bits": pa.int64(), "phash": pa.int64(), "rank": pa.int64()}
)
"""Perceptual hashes with their first rank, by the bits of a choice of their blocks."""

MATCHES = pa.schema([("rank", pa.int64()), ("reason", pa.int8()), ("of", pa.int64())])
"""The row `rank` duplicates the row `of`, for the reason at an index of `REASON_ORDER`."""

REASON_ORDER: Final = (
    "evaluation_image",
    "evaluation_caption",
    "duplicate_url",
    "duplicate_image",
    "near_duplicate_image",
    "duplicate_caption",
)
"""The reasons for which a row is a duplicate; the first of several is recorded."""

_NEAR: Final = REASON_ORDER.index("near_duplicate_image")
_DUPLICATE_REASONS: Final = {URL: "duplicate_url", IMAGE: "duplicate_image", CAPTION: "duplicate_caption"}
_EVAL_REASONS: Final = {URL: "evaluation_image", IMAGE: "evaluation_image", CAPTION: "evaluation_caption"}
_BITS: Final = 64
# Comparing two hashes takes nanoseconds, moving one to its group a hundred times as long.
_FULL_GROUP: Final = 256
# The finalizer of SplitMix64: every bit of the key changes every bit of the result.
_SPLITMIX: Final = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))


@dataclass(frozen=True, kw_only=True)
class RankBounds:
    """Ranks that divide the order of all rows.

    Attributes:
        evaluation_end: ranks below are rows of the evaluation set.
        new_begin: ranks from here on are checked in this round; others were, or belong to other tables.
    """

    evaluation_end: int
    new_begin: int


@dataclass(frozen=True, kw_only=True)
class BlockIndex:
    """Finds hashes within `max_hamming` bits without comparing all pairs. Manku et al. 2007, Sec. 3.

    Two hashes that differ in d bits have at least `blocks` - d of their blocks in common: so they agree on
    one of the choices of `blocks` - d blocks, and only hashes that do are compared.
    """

    max_hamming: int
    blocks: int

    @property
    def masks(self) -> list[int]:
        """The bits of each choice."""
        edges = [_BITS * number // self.blocks for number in range(self.blocks + 1)]
        single = [((1 << end) - 1) ^ ((1 << begin) - 1) for begin, end in itertools.pairwise(edges)]
        return [sum(some) for some in itertools.combinations(single, self.blocks - self.max_hamming)]

    @classmethod
    def for_rows(cls, rows: int, *, max_hamming: int) -> BlockIndex:
        """The index of fewest keys per hash whose groups would be small if hashes were uniform."""
        blocks = max_hamming + 1
        while (
            rows > _FULL_GROUP << (_BITS * (blocks - max_hamming) // blocks) and blocks < 2 * max_hamming + 2
        ):
            blocks += 1
        return cls(max_hamming=max_hamming, blocks=blocks)

    def __len__(self) -> int:
        return math.comb(self.blocks, self.max_hamming)


def partition_of(keys: np.ndarray, *, parts: int) -> np.ndarray:
    """The group, of `parts`, of each key int64 [n]: int32 [n], the same on every machine."""
    mixed = keys.astype(np.int64).view(np.uint64)
    for shift, factor in _SPLITMIX:
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return (mixed % np.uint64(parts)).astype(np.int32)


def exact_matches(table: pa.Table, *, bounds: RankBounds, kinds: frozenset[int]) -> pa.Table:
    """`EXACT_KEYS` to `MATCHES`: each new row with the first row of its key, if that is another one.

    A key of the evaluation set counts whatever its kind; another one only if its kind is among `kinds`.
    """
    kind, key, rank = _sorted_columns(table, "kind", "key", "rank")
    first = rank[_run_starts(kind, key)]
    in_evaluation = first < bounds.evaluation_end
    counts = in_evaluation | np.isin(kind, sorted(kinds))
    matched = (rank >= bounds.new_begin) & (first < rank) & counts
    codes = np.where(in_evaluation, _codes(_EVAL_REASONS)[kind], _codes(_DUPLICATE_REASONS)[kind])
    return _matches(rank[matched], codes[matched], first[matched])


def phash_blocks(table: pa.Table, *, index: BlockIndex, parts: int) -> pa.Table:
    """`PHASHES` to `BLOCKS`: each hash once, with its first rank, under each choice of its blocks."""
    phash, rank = _sorted_columns(table, "phash", "rank")
    firsts = np.unique(_run_starts(phash))
    phash, rank = phash[firsts], rank[firsts]
    return pa.concat_tables(
        _blocks_of_choice(phash, rank, choice=choice, mask=mask, parts=parts)
        for choice, mask in enumerate(index.masks)
    )


def near_phashes(table: pa.Table, *, index: BlockIndex, parts: int) -> pa.Table:
    """`BLOCKS` to `PHASHES`: each hash with the first rank of those near it, if that is before its own."""
    choice, bits, phash, rank = _sorted_columns(table, "choice", "bits", "phash", "rank")
    nearest = _nearest(_run_starts(choice, bits), phash.view(np.uint64), rank, max_hamming=index.max_hamming)
    earlier = nearest < rank
    near = np.ones(np.count_nonzero(earlier), bool)
    return phash_table(phash[earlier], nearest[earlier], near=near, parts=parts)


def near_matches(table: pa.Table, *, bounds: RankBounds) -> pa.Table:
    """`PHASHES` of both kinds to `MATCHES`: each new row with the first row that looks like it."""
    phash, rank, near = _sorted_columns(table, "phash", "rank", "near")
    first = rank[_run_starts(phash)]
    matched = ~near & (rank >= bounds.new_begin) & (first < rank)
    codes = np.where(first < bounds.evaluation_end, REASON_ORDER.index("evaluation_image"), _NEAR)
    return _matches(rank[matched], codes[matched], first[matched])


def first_reasons(table: pa.Table) -> pa.Table:
    """`MATCHES` to one match per row, ordered by rank: of its first reason the earliest row."""
    rank, reason, of = _sorted_columns(table, "rank", "reason", "of")
    firsts = np.unique(_run_starts(rank))
    return _matches(rank[firsts], reason[firsts], of[firsts])


def phash_table(phash: np.ndarray, rank: np.ndarray, *, near: np.ndarray, parts: int) -> pa.Table:
    """`PHASHES` of hashes int64 [n], ranks int64 [n] and flags bool [n]."""
    return pa.table([partition_of(phash, parts=parts), phash, rank, near], schema=PHASHES)


def exact_key_table(kind: int, key: np.ndarray, rank: np.ndarray, *, parts: int) -> pa.Table:
    """`EXACT_KEYS` of keys int64 [n] of one kind and ranks int64 [n]."""
    # The kind is mixed in, or equal keys of different kinds would crowd one part.
    part = partition_of(key ^ np.int64(kind), parts=parts)
    return pa.table([part, np.full(len(key), kind, np.int8), key, rank], schema=EXACT_KEYS)


def _blocks_of_choice(phash: np.ndarray, rank: np.ndarray, *, choice: int, mask: int, parts: int) -> pa.Table:
    bits = (phash.view(np.uint64) & np.uint64(mask)).view(np.int64)
    part = partition_of(bits ^ np.int64(choice), parts=parts)
    return pa.table([part, np.full(len(phash), choice, np.int16), bits, phash, rank], schema=BLOCKS)


def _nearest(begins: np.ndarray, phash: np.ndarray, rank: np.ndarray, *, max_hamming: int) -> np.ndarray:
    """The least rank among each hash and those of its group that are near it: int64 [n].

    Each hash is compared with the next one, the one after it, and so on to the end of its group, in all
    groups at once, so that memory does not grow with the square of a group.
    """
    nearest = rank.copy()
    here = np.arange(len(rank))
    step = 0
    while len(here):
        step += 1
        here = here[here + step < len(rank)]
        here = here[begins[here + step] == begins[here]]
        near = here[np.bitwise_count(phash[here] ^ phash[here + step]) <= max_hamming]
        # No index occurs twice on either side, so plain assignment is enough.
        nearest[near] = np.minimum(nearest[near], rank[near + step])
        nearest[near + step] = np.minimum(nearest[near + step], rank[near])
    return nearest


def _sorted_columns(table: pa.Table, *names: str) -> list[np.ndarray]:
    """The columns of these names, with the rows sorted by all of them, the first one foremost."""
    columns = [table.column(name).to_numpy() for name in names]
    by = np.lexsort(columns[::-1])
    return [column[by] for column in columns]


def _run_starts(*columns: np.ndarray) -> np.ndarray:
    """Of rows sorted by these columns, the index at which each row's run of equal ones begins: int64 [n]."""
    size = len(columns[0])
    new = np.zeros(size, bool)
    new[:1] = True
    for column in columns:
        new[1:] |= column[1:] != column[:-1]
    return np.maximum.accumulate(np.where(new, np.arange(size), 0))


def _codes(reasons: dict[int, str]) -> np.ndarray:
    return np.array([REASON_ORDER.index(reasons[kind]) for kind in sorted(reasons)], np.int8)


def _matches(rank: np.ndarray, reason: np.ndarray, of: np.ndarray) -> pa.Table:
    return pa.table([rank, reason.astype(np.int8), of], schema=MATCHES)
