"""Which rows are wanted, by what their metadata and captions say, in any of the public spellings.

A row is a link before its download or a sample after it: both have metadata and a caption, so the bounds that
choose what is downloaded are those that choose what is encoded.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from pydantic import Field

from pipelines.rejection import Rejected
from pipelines.sources.layouts import SPELLINGS, Meaning, number_of, text_of, texts_of
from snapfusion.settings import Settings


class Selection(Settings):
    """Bounds; None and () ask for nothing. A value equal to its bound is wanted.

    What is missing, null or NaN never speaks against a row. Which columns a bound looks at is in
    `pipelines.sources.layouts.SPELLINGS`, under the meaning that `BOUNDS` gives it.

    Attributes:
        min_width: pixels of the original picture.
        min_height: pixels of the original picture.
        min_side: pixels of its shorter side, whichever that is.
        max_aspect: longer side over shorter side; 1 wants squares alone. COYO was cut at 3.
        min_aesthetic: LAION's aesthetic score, about 1 to 10.
        max_watermark: probability of a watermark, 0 to 1.
        max_unsafe: probability of unsafe content, 0 to 1; of several detectors the highest counts.
        refused_tags: values of LAION's NSFW column that are refused, in any case of letters.
        min_similarity: cosine of CLIP's picture and text features, -1 to 1. Which CLIP is the data set's
            affair: of ViT-B/32 about 0.3 is a good pair, of ViT-L/14 about 0.25.
        languages: values of the LANGUAGE column that are wanted, as they are spelled there ("en"), in any
            case of letters. Only the multilingual part of LAION-5B has the column.
        min_caption_chars: characters of the caption, white space made one space.
        max_caption_chars: likewise; a text encoder of 77 tokens reads about 300.
        min_caption_words: words of the caption: what white space parts.
        min_latin_share: Latin letters among its letters, 0 to 1; a caption without letters is wanted.
    """

    min_width: int | None = Field(None, ge=1)
    min_height: int | None = Field(None, ge=1)
    min_side: int | None = Field(None, ge=1)
    max_aspect: float | None = Field(None, ge=1)
    min_aesthetic: float | None = None
    max_watermark: float | None = Field(None, ge=0, le=1)
    max_unsafe: float | None = Field(None, ge=0, le=1)
    refused_tags: tuple[Literal["UNLIKELY", "UNSURE", "NSFW"], ...] = ()
    min_similarity: float | None = Field(None, ge=-1, le=1)
    languages: tuple[str, ...] = ()
    min_caption_chars: int | None = Field(None, ge=1)
    max_caption_chars: int | None = Field(None, ge=1)
    min_caption_words: int | None = Field(None, ge=1)
    min_latin_share: float | None = Field(None, ge=0, le=1)

    def asked(self) -> Iterator[tuple[Bound, Any]]:
        """The bounds that are set, in the order in which they are checked, each with its limit."""
        for bound in BOUNDS:
            limit = getattr(self, bound.setting)
            if limit is not None and limit != ():
                yield bound, limit


@dataclass(frozen=True)
class Row:
    """What a bound looks at."""

    metadata: Mapping[str, Any]
    caption: str

    def number(self, meaning: Meaning) -> float | None:
        """As `pipelines.sources.layouts.number_of` says."""
        return number_of(self.metadata, meaning)


@dataclass(frozen=True, kw_only=True)
class Bound:
    """One setting of `Selection`, and how a row is held to it.

    Attributes:
        setting: its name.
        reason: under which a row is refused.
        looks_at: the meanings of the columns that it needs; none for the caption, which every row has.
        refuses: of a row and the limit, what speaks against the row, or nothing.
    """

    setting: str
    reason: str
    looks_at: tuple[Meaning, ...] = ()
    refuses: Callable[[Row, Any], str]


def check(metadata: Mapping[str, Any], *, caption: str, selection: Selection) -> None:
    """Let a row pass, or say why it is not wanted. What is missing, null or NaN never speaks against a row.

    Raises:
        Rejected: with the reason of the first of `BOUNDS`, in their order, that refuses it.
    """
    row = Row(metadata, caption)
    for bound, limit in selection.asked():
        detail = bound.refuses(row, limit)
        if detail:
            raise Rejected(bound.reason, detail)


def silent_bounds(selection: Selection, columns: Iterable[str]) -> list[str]:
    """The bounds that are set and refuse nothing, because none of these columns says what they look at."""
    there = set(columns)
    return [
        bound.setting
        for bound, _ in selection.asked()
        if not all(there.intersection(SPELLINGS[meaning]) for meaning in bound.looks_at)
    ]


def caption_words(caption: str) -> int:
    """How many runs of characters white space parts."""
    return len(caption.split())


def latin_share(caption: str) -> float | None:
    """Latin letters among the letters of a caption, 0 to 1; None where it has no letter."""
    letters = [character for character in caption if character.isalpha()]
    return sum(map(_is_latin, letters)) / len(letters) if letters else None


@functools.lru_cache(maxsize=1 << 16)
def _is_latin(letter: str) -> bool:
    return letter.isascii() or "LATIN" in unicodedata.name(letter, "")


def short_side(row: Row) -> float | None:
    """The shorter side; where only one is known, that one."""
    return min((side for side in _sides(row) if side is not None), default=None)


def aspect(row: Row) -> float | None:
    """Longer side over shorter side; None unless both are known."""
    width, height = _sides(row)
    return None if width is None or height is None else max(width, height) / min(width, height)


def _sides(row: Row) -> tuple[float | None, float | None]:
    return row.number("width"), row.number("height")


def _least(measure: Callable[[Row], float | None], what: str) -> Callable[[Row, Any], str]:
    def refuses(row: Row, limit: float) -> str:
        value = measure(row)
        return f"{what} {value:g} is below {limit:g}" if value is not None and value < limit else ""

    return refuses


def _most(measure: Callable[[Row], float | None], what: str) -> Callable[[Row, Any], str]:
    def refuses(row: Row, limit: float) -> str:
        value = measure(row)
        return f"{what} {value:g} is above {limit:g}" if value is not None and value > limit else ""

    return refuses


def _number(meaning: Meaning) -> Callable[[Row], float | None]:
    return lambda row: row.number(meaning)


def _refused_tag(row: Row, refused: tuple[str, ...]) -> str:
    tags = (tag for tag in texts_of(row.metadata, "nsfw_tag") if tag.upper() in refused)
    return next((f"tagged {tag}" for tag in tags), "")


def _other_language(row: Row, wanted: tuple[str, ...]) -> str:
    language = text_of(row.metadata, "language")
    if language is None or language.casefold() in {word.casefold() for word in wanted}:
        return ""
    return f"language {language} is not among {', '.join(wanted)}"


BOUNDS: Final = (
    Bound(
        setting="min_width",
        reason="low_resolution",
        looks_at=("width",),
        refuses=_least(_number("width"), "width"),
    ),
    Bound(
        setting="min_height",
        reason="low_resolution",
        looks_at=("height",),
        refuses=_least(_number("height"), "height"),
    ),
    Bound(
        setting="min_side",
        reason="short_side",
        looks_at=("width", "height"),
        refuses=_least(short_side, "shorter side"),
    ),
    Bound(
        setting="max_aspect",
        reason="extreme_aspect",
        looks_at=("width", "height"),
        refuses=_most(aspect, "aspect"),
    ),
    Bound(
        setting="min_aesthetic",
        reason="low_aesthetic",
        looks_at=("aesthetic",),
        refuses=_least(_number("aesthetic"), "score"),
    ),
    Bound(
        setting="max_watermark",
        reason="watermarked",
        looks_at=("watermark",),
        refuses=_most(_number("watermark"), "probability"),
    ),
    Bound(
        setting="max_unsafe",
        reason="unsafe",
        looks_at=("unsafe",),
        refuses=_most(_number("unsafe"), "probability"),
    ),
    Bound(setting="refused_tags", reason="unsafe", looks_at=("nsfw_tag",), refuses=_refused_tag),
    Bound(
        setting="min_similarity",
        reason="low_similarity",
        looks_at=("similarity",),
        refuses=_least(_number("similarity"), "similarity"),
    ),
    Bound(setting="languages", reason="other_language", looks_at=("language",), refuses=_other_language),
    Bound(
        setting="min_caption_chars",
        reason="short_caption",
        refuses=_least(lambda row: len(row.caption), "length"),
    ),
    Bound(
        setting="max_caption_chars",
        reason="long_caption",
        refuses=_most(lambda row: len(row.caption), "length"),
    ),
    Bound(
        setting="min_caption_words",
        reason="few_words",
        refuses=_least(lambda row: caption_words(row.caption), "words"),
    ),
    Bound(
        setting="min_latin_share",
        reason="other_script",
        refuses=_least(lambda row: latin_share(row.caption), "share of Latin letters"),
    ),
)
"""Every bound of `Selection`, in the order of the checks; the first that refuses a row names the reason.

What is cheap to know of a picture comes before what is said of it, and that before the caption.
"""
