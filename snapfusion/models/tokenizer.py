"""CLIP's tokenizer, made from the vocabulary that open_clip carries in its own package: no download.

Two public tokenizers differ on a few texts: OpenAI's first runs ftfy and html.unescape (curly quotes become
straight, ``&quot;`` becomes a quote), the one of transformers does not. We take the latter, because
Stable Diffusion was published with it, and so a diffusers pipeline sees the same ids.
"""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
NUM_MERGES = 48894
"""How many of the file's merges CLIP uses: 49,152 - 256 - 2."""


def clip_tokenizer(*, padding: str = END) -> CLIPTokenizer:
    """The tokenizer of SD-v1.5: 49,408 tokens, at most 77 a text, padded with the end token (49407).

    That of SD-v2 differs in its `padding` alone.
    """
    import open_clip

    path = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(path.read_bytes()).decode().split("\n")
    merges = [tuple(line.split()) for line in lines[1 : NUM_MERGES + 1]]
    return build_tokenizer(merges, max_length=77, padding=padding)


def build_tokenizer(
    merges: Sequence[tuple[str, ...]], *, max_length: int, padding: str = END
) -> CLIPTokenizer:
    """A CLIP tokenizer from its merges: 256 bytes, 256 word-final bytes, the merges, start, end.

    The end token has the highest id, which is how CLIP's text tower finds the place to pool.
    """
    base = list(_byte_letters())
    tokens = [*base, *(f"{letter}</w>" for letter in base), *("".join(pair) for pair in merges), START, END]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[tuple(pair) for pair in merges],
        model_max_length=max_length,
        pad_token=padding,
    )


def tokenize(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> Tensor:
    """Captions as int64 [B, L], L the tokenizer's maximum: start, text cut to fit, end, padding."""
    encoded = tokenizer(
        list(captions), padding="max_length", truncation=True, max_length=tokenizer.model_max_length
    )
    return torch.tensor(encoded["input_ids"], dtype=torch.int64)


def _byte_letters() -> list[str]:
    """One printable letter for each byte, in GPT-2's order: printable bytes first, then the others."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    return [*map(chr, printable), *(chr(256 + place) for place in range(len(others)))]
