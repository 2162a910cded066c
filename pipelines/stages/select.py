"""Selects rows by bounds on metadata and captions, in the column names of all public data sets.

A row is a link before its download and a sample after it; the same bounds choose what is downloaded and what
is encoded.
"""

import functools
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from pipelines.rejections import Rejected
from pipelines.sources.layouts import SPELLINGS, Meaning, incomparable_value, number_of, text_of, texts_of
from pipelines.stages.settings import Selection


@dataclass(frozen=True)
class CandidateRow:
    """The part of a row that bounds are checked against."""

    metadata: Mapping[str, Any]
    caption: str

    def number(self, meaning: Meaning) -> float | None:
        """The number in the columns of this meaning; None where it is missing, null or NaN."""
        return number_of(self.metadata, meaning)


@dataclass(frozen=True)
class Measure:
    """A number that a row has, by name; `of` returns None where it is not known."""

    name: str
    of: Callable[[CandidateRow], float | None]


@dataclass(frozen=True, kw_only=True)
class Bound:
    """The check of one setting of `Selection`.

    Attributes:
        setting: its name.
        reason: of the rejection.
        columns: the meanings of the columns that it reads; none for the caption, which every row has.
        measure: the number that it bounds, if any.
        violation: of a row and the limit, how the row violates it; empty if it does not.
    """

    setting: str
    reason: str
    columns: tuple[Meaning, ...] = ()
    measure: Measure | None = None
    violation: Callable[[CandidateRow, Any], str]


def check(metadata: Mapping[str, Any], *, caption: str, selection: Selection) -> None:
    """Let a row pass, or raise. A value that is missing, null or NaN violates no bound.

    Raises:
        Rejected: with the reason of the first of `BOUNDS` that the row violates, or `bad_metadata` if a value
            cannot be compared with it.
    """
    row = CandidateRow(metadata, caption)
    for bound, limit in active_bounds(selection):
        if detail := bound.violation(row, limit):
            raise Rejected(bound.reason, detail)
        for meaning in bound.columns:
            if value := incomparable_value(metadata, meaning):
                raise Rejected("bad_metadata", f"{bound.setting} cannot be compared with {value}")


def active_bounds(selection: Selection) -> Iterator[tuple[Bound, Any]]:
    """The bounds that are set, in the order of their checks, each with its limit."""
    for bound in BOUNDS:
        limit = getattr(selection, bound.setting)
        if limit is not None and limit != ():
            yield bound, limit


def silent_bounds(selection: Selection, columns: Iterable[str]) -> list[str]:
    """The bounds that are set and reject nothing, because a column that they read is not among these."""
    present = set(columns)
    return [
        bound.setting
        for bound, _ in active_bounds(selection)
        if not all(present.intersection(SPELLINGS[meaning]) for meaning in bound.columns)
    ]


def latin_share(caption: str) -> float | None:
    """The share of Latin letters among a caption's letters, 0 to 1; None where it has no letter."""
    letters = [character for character in caption if character.isalpha()]
    return sum(map(_is_latin, letters)) / len(letters) if letters else None


@functools.lru_cache(maxsize=1 << 16)
def _is_latin(letter: str) -> bool:
    return letter.isascii() or "LATIN" in unicodedata.name(letter, "")


def _short_side(row: CandidateRow) -> float | None:
    return min(_sides(row), default=None)


def _aspect(row: CandidateRow) -> float | None:
    sides = _sides(row)
    return max(sides) / min(sides) if len(sides) == 2 else None


def _sides(row: CandidateRow) -> list[float]:
    """Width and height, as far as they are known."""
    return [side for side in (row.number("width"), row.number("height")) if side is not None]


def _refused_tag(row: CandidateRow, refused: tuple[str, ...]) -> str:
    tags = (tag for tag in texts_of(row.metadata, "nsfw_tag") if tag.upper() in refused)
    return next((f"tagged {tag}" for tag in tags), "")


def _other_language(row: CandidateRow, accepted: tuple[str, ...]) -> str:
    language = text_of(row.metadata, "language")
    if language is None or language.casefold() in {word.casefold() for word in accepted}:
        return ""
    return f"language {language} is not among {', '.join(accepted)}"


_WIDTH: Final = Measure("width", lambda row: row.number("width"))
_HEIGHT: Final = Measure("height", lambda row: row.number("height"))
_SIDE: Final = Measure("shorter side", _short_side)
_ASPECT: Final = Measure("aspect", _aspect)
_AESTHETIC: Final = Measure("aesthetic score", lambda row: row.number("aesthetic"))
_WATERMARK: Final = Measure("watermark probability", lambda row: row.number("watermark"))
_UNSAFE: Final = Measure("unsafe probability", lambda row: row.number("unsafe"))
_SIMILARITY: Final = Measure("similarity", lambda row: row.number("similarity"))
_CHARS: Final = Measure("caption characters", lambda row: len(row.caption))
_WORDS: Final = Measure("caption words", lambda row: len(row.caption.split()))
_LATIN: Final = Measure("share of Latin letters", lambda row: latin_share(row.caption))


def _bound(setting: str, reason: str, measure: Measure, *columns: Meaning) -> Bound:
    """The check of a number, from below for `min_...` and from above for `max_...`."""
    is_minimum = setting.startswith("min_")

    def violation(row: CandidateRow, limit: float) -> str:
        value = measure.of(row)
        if value is None or (value >= limit if is_minimum else value <= limit):
            return ""
        return f"{measure.name} {value:g} is {'below' if is_minimum else 'above'} {limit:g}"

    return Bound(setting=setting, reason=reason, columns=columns, measure=measure, violation=violation)


# Checked in this order, and the first violation names the reason: the image's size, then its scores, then the
# caption. Reasons are stored, so the order is part of what a table holds.
BOUNDS: Final = (
    _bound("min_width", "low_resolution", _WIDTH, "width"),
    _bound("min_height", "low_resolution", _HEIGHT, "height"),
    _bound("min_side", "short_side", _SIDE, "width", "height"),
    _bound("max_aspect", "extreme_aspect", _ASPECT, "width", "height"),
    _bound("min_aesthetic", "low_aesthetic", _AESTHETIC, "aesthetic"),
    _bound("max_watermark", "watermarked", _WATERMARK, "watermark"),
    _bound("max_unsafe", "unsafe", _UNSAFE, "unsafe"),
    Bound(setting="refused_tags", reason="unsafe", columns=("nsfw_tag",), violation=_refused_tag),
    _bound("min_similarity", "low_similarity", _SIMILARITY, "similarity"),
    Bound(setting="languages", reason="other_language", columns=("language",), violation=_other_language),
    _bound("min_caption_chars", "short_caption", _CHARS),
    _bound("max_caption_chars", "long_caption", _CHARS),
    _bound("min_caption_words", "few_words", _WORDS),
    _bound("min_latin_share", "other_script", _LATIN),
)

MEASURES: Final = tuple(dict.fromkeys(bound.measure for bound in BOUNDS if bound.measure is not None))
"""The measures of all bounds, each once."""
