"""Every loader yields one sequence of batches, whoever reads it and from wherever."""

import itertools
from collections import Counter
from functools import partial

import pytest
from memory_table import ids
from test_branches import loader as branch_loader
from test_buckets import loader as bucket_loader
from test_loader import loader as batch_loader

LOADERS = [batch_loader, branch_loader, bucket_loader, partial(batch_loader, lanes=4)]


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("loader", LOADERS)
def test_sequence_is_independent_of_rank_count(loader, world):
    shares = [ids(loader(), rank=rank, world=world) for rank in range(world)]
    joined = [Counter(itertools.chain(*parts)) for parts in zip(*shares, strict=True)]
    assert joined == [Counter(batch) for batch in ids(loader())]


@pytest.mark.parametrize("start", [1, 2, 5, 6, 7, 9, 10, 11, 14, 17])
@pytest.mark.parametrize("loader", LOADERS)
def test_sequence_is_independent_of_restarts(loader, start):
    assert ids(loader(), start=start, count=12) == ids(loader(), count=30)[start : start + 12]


@pytest.mark.parametrize("loader", LOADERS)
def test_sequence_depends_on_the_seed(loader):
    assert ids(loader(seed=1)) != ids(loader())
