"""Normalises captions, from whatever source."""

from pipelines.rejections import Rejected

MAX_CAPTION_CHARS = 2000


def clean_caption(text: str | bytes | None, *, max_chars: int = MAX_CAPTION_CHARS) -> str:
    """The caption on one line, runs of white space collapsed, at most `max_chars` characters.

    A longer caption is truncated, not rejected: web alt-texts of any length are usable, and the text encoder
    reads only 77 tokens. White space is collapsed first, as in CLIP's tokenizer.

    Raises:
        Rejected: `missing_caption`, `bad_encoding` (also for NUL, as in UTF-16 without its mark) or
            `empty_caption`.
    """
    if text is None:
        raise Rejected("missing_caption")
    try:
        # A JSON escape can produce a lone surrogate, which no UTF-8 file can hold.
        valid = text.decode() if isinstance(text, bytes) else text.encode().decode()
    except UnicodeError as error:
        raise Rejected("bad_encoding", str(error)) from None
    if "\0" in valid:
        raise Rejected("bad_encoding", "it contains NUL")
    words = " ".join(valid.removeprefix("\ufeff").split())
    if not any(character.isprintable() and character != " " for character in words):
        raise Rejected("empty_caption")
    return words[:max_chars].rstrip()
