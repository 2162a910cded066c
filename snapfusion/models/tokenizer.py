"""CLIP's tokenizer, built from the vocabulary in the open_clip package without a download.

The two public tokenizers differ on a few texts: OpenAI's first applies ftfy and html.unescape (curly quotes
become straight, ``&quot;`` becomes a quote), that of transformers does not. This is the latter, with which
Stable Diffusion was published, so a diffusers pipeline gets the same ids.
"""

import gzip
import itertools
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
NUM_MERGES = 48894
"""Merges of the file that CLIP uses: 49,152 - 256 - 2."""
CLIP_VOCABULARY = 49408
"""Tokens of CLIP's tokenizer: 512 of single bytes, the merges, start and end."""


def clip_tokenizer(*, padding: str = END) -> CLIPTokenizer:
    """Build the tokenizer of SD-v1.5: 49,408 tokens, at most 77 per text, padded with the end token (49407).

    That of SD-v2 differs only in its `padding`.
    """
    import open_clip

    path = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(path.read_bytes()).decode().split("\n")
    merges = [tuple(line.split()) for line in lines[1 : NUM_MERGES + 1]]
    return build_tokenizer(merges, max_length=77, padding=padding)


def build_tokenizer(
    merges: Sequence[tuple[str, ...]], *, max_length: int, padding: str = END
) -> CLIPTokenizer:
    """Build a CLIP tokenizer of 256 bytes, 256 word-final bytes, the merges, start and end token."""
    base = list(_byte_letters())
    # The end token has the highest id: CLIP's text model pools at the position of the maximum.
    tokens = [*base, *(f"{letter}</w>" for letter in base), *("".join(pair) for pair in merges), START, END]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[tuple(pair) for pair in merges],
        model_max_length=max_length,
        pad_token=padding,
    )


def truncation_warning(tokenizer: CLIPTokenizer, caption: str) -> str | None:
    """One line if `tokenize` cuts a caption, else None."""
    (expanded,) = _expand(tokenizer, [caption])
    count = len(tokenizer(expanded, verbose=False)["input_ids"]) - 2
    most = tokenizer.model_max_length - 2
    return f"the caption has {count} tokens, and only the first {most} are read" if count > most else None


def tokenize(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> Tensor:
    """Tokenize captions to int64 [B,L], L the tokenizer's maximum: start, truncated text, end, padding.

    The token of a textual inversion of several vectors becomes as many tokens.
    """
    encoded = tokenizer(_expand(tokenizer, captions), padding="max_length", truncation=True)
    return torch.tensor(encoded["input_ids"], dtype=torch.int64)


def vector_tokens(token: str, *, count: int) -> list[str]:
    """Name the tokens of a textual inversion of several vectors as diffusers does: TOKEN, TOKEN_1, ..."""
    return [token, *(f"{token}_{number}" for number in range(1, count))]


def _expand(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> list[str]:
    """Write the token of each further vector behind that of a textual inversion's first, as diffusers does.

    CLIP's tokenizer reads captions in lower case, so letter case does not matter; in diffusers it does.
    """
    added = {token.lower() for token in tokenizer.added_tokens_encoder}
    first = [token for token in added if f"{token}_1" in added]
    if not first:
        return list(captions)
    # The longest first, so that TOKEN_1 in a caption is not read as TOKEN.
    names = re.compile("|".join(map(re.escape, sorted(added, key=len, reverse=True))), re.IGNORECASE)
    expanded = {token: " ".join(_vectors_of(token, added=added)) for token in first}
    return [names.sub(lambda match: expanded.get(match[0].lower(), match[0]), text) for text in captions]


def _vectors_of(token: str, *, added: set[str]) -> list[str]:
    count = next(number for number in itertools.count(1) if f"{token}_{number}" not in added)
    return vector_tokens(token, count=count)


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write transformers' files, and CLIP's classic vocab.json and merges.txt, which transformers 4 needs."""
    tokenizer.save_pretrained(folder)
    tokenizer.backend_tokenizer.model.save(str(folder))


def _byte_letters() -> list[str]:
    """Return one printable letter per byte in GPT-2's order: printable bytes first, then the others."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # ! to ~, ¡ to ¬, ® to ÿ
    others = [byte for byte in range(256) if byte not in printable]
    return [*map(chr, printable), *(chr(256 + index) for index in range(len(others)))]
