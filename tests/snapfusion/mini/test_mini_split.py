"""The split of the miniature's captions."""

import itertools

from snapfusion.mini.scenes import parse_caption
from snapfusion.mini.split import captions_in
from snapfusion.mini.vocabulary import NUM_CAPTIONS

SIZES = {"training": 840, "validation": 120, "test": 240}


def pairs_in(split):
    """Every two values of different attributes that occur together."""
    found = set()
    for caption in captions_in(split):
        values = vars(parse_caption(caption)).items()
        found |= {frozenset(pair) for pair in itertools.combinations(values, 2)}
    return found


def test_each_caption_is_in_one_split():
    captions = [caption for split in SIZES for caption in captions_in(split)]
    assert {split: len(captions_in(split)) for split in SIZES} == SIZES
    assert len(set(captions)) == len(captions) == NUM_CAPTIONS


def test_every_pair_of_values_is_trained():
    # 10 pairs of attributes: 2 x 6 + 2 x 5 + ... + 5 x 4.
    assert len(pairs_in("training")) == 189
    assert pairs_in("test") | pairs_in("validation") <= pairs_in("training")
