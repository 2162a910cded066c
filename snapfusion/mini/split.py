"""The split of the miniature's captions: 840 train, 120 validate, 240 test. Imports no torch.

Those of validation and test stand in `splits/NAME.txt`, one a line, so that they can be given wherever a
caption list is read. Every two values of different attributes occur together in training.
"""

import functools
import itertools
from pathlib import Path
from typing import Literal

from snapfusion.mini.captions import TEMPLATE
from snapfusion.mini.vocabulary import ATTRIBUTES

Split = Literal["training", "validation", "test"]

_FOLDER = Path(__file__).parent / "splits"


@functools.cache
def captions_in(split: Split) -> tuple[str, ...]:
    """The captions of a split, in the order of their attributes' values."""
    if split != "training":
        return tuple((_FOLDER / f"{split}.txt").read_text(encoding="utf-8").splitlines())
    others = {*captions_in("validation"), *captions_in("test")}
    scenes = itertools.product(*ATTRIBUTES.values())
    every = (TEMPLATE.format(**dict(zip(ATTRIBUTES, words, strict=True))) for words in scenes)
    return tuple(caption for caption in every if caption not in others)
