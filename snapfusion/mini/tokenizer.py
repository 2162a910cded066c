"""The miniature's tokenizer: CLIP's byte-level BPE with a small vocabulary, as a stock `CLIPTokenizer`.

256 byte symbols, each also with the end-of-word mark, so that any text can be encoded; merges that join the
words of the scenes; then `<|startoftext|>` and `<|endoftext|>`. The last has the highest id, because CLIP's
text model pools at the highest id of a row; it is also the padding, as in SD-v1.5.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from transformers import CLIPTokenizer

from snapfusion.mini.scenes import caption_of, scene_of
from snapfusion.mini.vocabulary import NUM_CAPTIONS
from snapfusion.models.tokenizer import build_tokenizer

MAX_LENGTH = 24
"""Tokens per row, with start and end; a scene's caption has 13."""

_WORD_END = "</w>"


def scene_words() -> list[str]:
    """The words of all captions, sorted."""
    return sorted({word for index in range(NUM_CAPTIONS) for word in caption_of(scene_of(index)).split()})


def train_merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """The merges, in rank order, after which every one of `words` is one token (Sennrich et al. 2016).

    Of equally frequent pairs the first in the alphabet is merged.
    """
    # Trained, because hand-written ranks conflict where words share letters ("small" and "square"), and words
    # then stay split. Not by the trainer of `tokenizers`, which breaks ties differently in every run.
    split = [[*word[:-1], word[-1] + _WORD_END] for word in words]
    merges: list[tuple[str, str]] = []
    while counts := Counter(pair for symbols in split for pair in pairwise(symbols)):
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        split = [_merge(symbols, best) for symbols in split]
    return merges


def _merge(symbols: Sequence[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for symbol in symbols:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return merged


def mini_tokenizer() -> CLIPTokenizer:
    """The tokenizer: 605 tokens, at most 24 per text."""
    return build_tokenizer(train_merges(scene_words()), max_length=MAX_LENGTH)
