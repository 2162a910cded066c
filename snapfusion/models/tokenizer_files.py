"""Reading the tokenizer of a diffusers folder, and completing one that is missing or says no length."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from transformers import CLIPTokenizer

from snapfusion.models import sd2
from snapfusion.models.errors import ModelError
from snapfusion.models.tokenizer import CLIP_VOCABULARY, END, clip_tokenizer

_logger = logging.getLogger(__name__)
_SD2_WIDTH: Final = 1024
_VOCABULARIES = ("tokenizer.json", "vocab.json")


def read_tokenizer(folder: Path, *, text_encoder: Mapping[str, Any], source: str) -> CLIPTokenizer:
    """Read a tokenizer; its length, and all of it if it is CLIP's, may be missing.

    Args:
        folder: of the tokenizer.
        text_encoder: the configuration of the text encoder, which says how many tokens it reads.
        source: the model, named in errors and in the line that is logged about what was missing.

    Raises:
        ModelError: if it is missing and not CLIP's, or cannot be read.
    """
    length = int(text_encoder.get("max_position_embeddings", 77))
    if not has_vocabulary(folder):
        if text_encoder.get("vocab_size", CLIP_VOCABULARY) != CLIP_VOCABULARY:
            raise ModelError(
                f"{source}: its tokenizer is missing, and its text encoder's vocabulary has "
                f"{text_encoder['vocab_size']} tokens, not the {CLIP_VOCABULARY} of CLIP's tokenizer"
            )
        _logger.info("%s has no tokenizer; CLIP's is used", source)
        return clip_tokenizer(padding=sd2.PADDING if text_encoder.get("hidden_size") == _SD2_WIDTH else END)
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder)
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{source}: its tokenizer cannot be read: {reason}") from None
    # Without a length transformers sets 1e30, and each caption would be padded to that.
    if tokenizer.model_max_length > length:
        _logger.info("%s's tokenizer has no length; the text encoder reads %d tokens", source, length)
        tokenizer.model_max_length = length
    return tokenizer


def has_vocabulary(folder: Path) -> bool:
    """Tell whether a folder has a tokenizer's vocabulary."""
    return any((folder / name).is_file() for name in _VOCABULARIES)
