"""The captions that the miniature knows: a sentence with a value for each attribute. Imports no torch.

Any other text can be encoded, but the miniature was trained on none, and its images of it mean nothing.
"""

import functools
import itertools
from typing import Any

from snapfusion.mini.vocabulary import ATTRIBUTES, NUM_CAPTIONS

TEMPLATE = "a {size} {color} {shape} {position} on a {background} background"

VOCABULARY_SIZE = 605
"""Tokens of the miniature's tokenizer, and of that of every model made of it."""


def knows_caption(caption: str) -> bool:
    """Whether a caption describes a scene; letter case and spaces do not matter, as for the tokenizer."""
    return normalized(caption) in _captions()


def normalized(caption: str) -> str:
    """The caption as the tokenizer reads it: in lower case, with single spaces."""
    return " ".join(caption.lower().split())


def caption_warning(caption: str, *, vocabulary_size: int) -> str | None:
    """One line if a model with the miniature's vocabulary does not know a caption, else None.

    Args:
        caption: to be generated.
        vocabulary_size: of the model's tokenizer, without the tokens of textual inversions.
    """
    if vocabulary_size != VOCABULARY_SIZE or knows_caption(caption):
        return None
    return f"the miniature does not know the caption {caption!r}: it knows {_description()}"


def known_captions(*, vocabulary_size: int) -> dict[str, Any] | None:
    """The sentence and the words of each of its gaps, as JSON, for a model with the miniature's vocabulary.

    Args:
        vocabulary_size: of the model's tokenizer, without the tokens of textual inversions.
    """
    if vocabulary_size != VOCABULARY_SIZE:
        return None
    return {"template": TEMPLATE, "words": {name: list(values) for name, values in ATTRIBUTES.items()}}


def caption_grammar() -> str:
    """One sentence about the captions: their form and their words."""
    return f"the miniature knows {_description()}"


def _description() -> str:
    example = TEMPLATE.format(**{name: values[0] for name, values in ATTRIBUTES.items()})
    words = [f"{name} {', '.join(values[:-1])} or {values[-1]}" for name, values in ATTRIBUTES.items()]
    return f'{NUM_CAPTIONS:,} captions like "{example}", of {"; ".join(words)}'


@functools.cache
def _captions() -> frozenset[str]:
    scenes = itertools.product(*ATTRIBUTES.values())
    return frozenset(TEMPLATE.format(**dict(zip(ATTRIBUTES, words, strict=True))) for words in scenes)
