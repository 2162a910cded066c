"""A caption as a row keeps it, wherever it comes from."""

from __future__ import annotations

from pipelines.rejections import Rejected

MAX_CAPTION_CHARS = 2000


def clean_caption(text: str | bytes | None, *, max_chars: int = MAX_CAPTION_CHARS) -> str:
    """The caption on one line, runs of white space made one space, at most `max_chars` characters.

    A longer caption is cut and not rejected: web alt-texts of any length are usable, and the text encoder
    reads 77 tokens of them. White space goes first, as in CLIP's tokenizer, so that the cut keeps words.

    Raises:
        Rejected: `missing_caption`, `bad_encoding` or `empty_caption`.
    """
    if text is None:
        raise Rejected("missing_caption")
    try:
        # A JSON escape can smuggle in half a character, which no UTF-8 file can hold.
        valid = text.decode() if isinstance(text, bytes) else text.encode().decode()
    except UnicodeError as error:
        raise Rejected("bad_encoding", str(error)) from None
    words = " ".join(valid.removeprefix("\ufeff").split())
    if not any(character.isprintable() and character != " " for character in words):
        raise Rejected("empty_caption")
    return words[:max_chars].rstrip()
