"""The miniature's tokenizer: CLIP's byte-level BPE with a small vocabulary, as a stock `CLIPTokenizer`.

256 byte symbols, each also with the end-of-word mark, so that any text can be said; merges that join the
words of the scenes; then `<|startoftext|>` and `<|endoftext|>`. The last has the highest id, because CLIP's
text model pools at the highest id of a row; it also pads, as in SD-v1.5.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from transformers import CLIPTokenizer

from snapfusion.mini.scenes import caption_of, scene_of
from snapfusion.mini.vocabulary import NUM_CAPTIONS
from snapfusion.models.tokenizer import build_tokenizer

MAX_LENGTH = 24
"""Tokens a row, the two marks included; a scene's caption takes 13."""

_WORD_END = "</w>"


def scene_words() -> list[str]:
    """The words of all captions, sorted."""
    return sorted({word for index in range(NUM_CAPTIONS) for word in caption_of(scene_of(index)).split()})


def train_merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """The merges, in rank order, after which every one of `words` is one token (Sennrich et al. 2016).

    They are trained rather than written down word by word, left to right: ranks made by hand clash where
    words share letters ("small" and "square"), and words then stay split. Of equally frequent pairs the first
    in the alphabet is merged; the trainer of `tokenizers` takes any, and so numbers tokens anew in every run.
    """
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
    """The tokenizer: 605 tokens, at most 24 a text."""
    return build_tokenizer(train_merges(scene_words()), max_length=MAX_LENGTH)


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write it as transformers does, with CLIP's classic vocab.json and merges.txt beside."""
    tokenizer.save_pretrained(folder)
    tokenizer.backend_tokenizer.model.save(str(folder))
