"""Which rows are wanted, by what their metadata and captions say, in any of the public spellings.

A row is a link before its download or a sample after it: both have metadata and a caption, so the bounds that
choose what is downloaded are those that choose what is encoded.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from pipelines.rejections import Rejected
from pipelines.sources.layouts import SPELLINGS, Meaning, number_of, text_of, texts_of
from pipelines.stages.settings import Selection


@dataclass(frozen=True)
class CandidateRow:
    """What a bound looks at."""

    metadata: Mapping[str, Any]
    caption: str

    def number(self, meaning: Meaning) -> float | None:
        """As `pipelines.sources.layouts.number_of` says."""
        return number_of(self.metadata, meaning)


@dataclass(frozen=True)
class Measure:
    """A number that a row has: what it is, and how it is found; None where it is not known."""

    what: str
    of: Callable[[CandidateRow], float | None]


@dataclass(frozen=True, kw_only=True)
class Bound:
    """One setting of `Selection`, and how a row is held to it.

    Attributes:
        setting: its name.
        reason: under which a row is refused.
        looks_at: the meanings of the columns that it needs; none for the caption, which every row has.
        measure: the number that it bounds; None where it bounds none.
        refuses: of a row and the limit, what speaks against the row, or nothing.
    """

    setting: str
    reason: str
    looks_at: tuple[Meaning, ...] = ()
    measure: Measure | None = None
    refuses: Callable[[CandidateRow, Any], str]


def check(metadata: Mapping[str, Any], *, caption: str, selection: Selection) -> None:
    """Let a row pass, or say why it is not wanted. What is missing, null or NaN never speaks against a row.

    Raises:
        Rejected: with the reason of the first of `BOUNDS`, in their order, that refuses it.
    """
    row = CandidateRow(metadata, caption)
    for bound, limit in set_bounds(selection):
        detail = bound.refuses(row, limit)
        if detail:
            raise Rejected(bound.reason, detail)


def set_bounds(selection: Selection) -> Iterator[tuple[Bound, Any]]:
    """The bounds that are set, in the order in which they are checked, each with its limit."""
    for bound in BOUNDS:
        limit = getattr(selection, bound.setting)
        if limit is not None and limit != ():
            yield bound, limit


def silent_bounds(selection: Selection, columns: Iterable[str]) -> list[str]:
    """The bounds that are set and refuse nothing, because none of these columns says what they look at."""
    there = set(columns)
    return [
        bound.setting
        for bound, _ in set_bounds(selection)
        if not all(there.intersection(SPELLINGS[meaning]) for meaning in bound.looks_at)
    ]


def latin_share(caption: str) -> float | None:
    """Latin letters among the letters of a caption, 0 to 1; None where it has no letter."""
    letters = [character for character in caption if character.isalpha()]
    return sum(map(_is_latin, letters)) / len(letters) if letters else None


@functools.lru_cache(maxsize=1 << 16)
def _is_latin(letter: str) -> bool:
    return letter.isascii() or "LATIN" in unicodedata.name(letter, "")


def _short_side(row: CandidateRow) -> float | None:
    return min((side for side in _sides(row) if side is not None), default=None)


def _aspect(row: CandidateRow) -> float | None:
    width, height = _sides(row)
    return None if width is None or height is None else max(width, height) / min(width, height)


def _sides(row: CandidateRow) -> tuple[float | None, float | None]:
    return row.number("width"), row.number("height")


def _least(measure: Measure) -> Callable[[CandidateRow, Any], str]:
    def refuses(row: CandidateRow, limit: float) -> str:
        value = measure.of(row)
        return f"{measure.what} {value:g} is below {limit:g}" if value is not None and value < limit else ""

    return refuses


def _most(measure: Measure) -> Callable[[CandidateRow, Any], str]:
    def refuses(row: CandidateRow, limit: float) -> str:
        value = measure.of(row)
        return f"{measure.what} {value:g} is above {limit:g}" if value is not None and value > limit else ""

    return refuses


def _refused_tag(row: CandidateRow, refused: tuple[str, ...]) -> str:
    tags = (tag for tag in texts_of(row.metadata, "nsfw_tag") if tag.upper() in refused)
    return next((f"tagged {tag}" for tag in tags), "")


def _other_language(row: CandidateRow, wanted: tuple[str, ...]) -> str:
    language = text_of(row.metadata, "language")
    if language is None or language.casefold() in {word.casefold() for word in wanted}:
        return ""
    return f"language {language} is not among {', '.join(wanted)}"


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

_SIZES: Final[tuple[Meaning, ...]] = ("width", "height")

BOUNDS: Final = (
    Bound(
        setting="min_width",
        reason="low_resolution",
        looks_at=("width",),
        measure=_WIDTH,
        refuses=_least(_WIDTH),
    ),
    Bound(
        setting="min_height",
        reason="low_resolution",
        looks_at=("height",),
        measure=_HEIGHT,
        refuses=_least(_HEIGHT),
    ),
    Bound(
        setting="min_side",
        reason="short_side",
        looks_at=_SIZES,
        measure=_SIDE,
        refuses=_least(_SIDE),
    ),
    Bound(
        setting="max_aspect",
        reason="extreme_aspect",
        looks_at=_SIZES,
        measure=_ASPECT,
        refuses=_most(_ASPECT),
    ),
    Bound(
        setting="min_aesthetic",
        reason="low_aesthetic",
        looks_at=("aesthetic",),
        measure=_AESTHETIC,
        refuses=_least(_AESTHETIC),
    ),
    Bound(
        setting="max_watermark",
        reason="watermarked",
        looks_at=("watermark",),
        measure=_WATERMARK,
        refuses=_most(_WATERMARK),
    ),
    Bound(
        setting="max_unsafe",
        reason="unsafe",
        looks_at=("unsafe",),
        measure=_UNSAFE,
        refuses=_most(_UNSAFE),
    ),
    Bound(setting="refused_tags", reason="unsafe", looks_at=("nsfw_tag",), refuses=_refused_tag),
    Bound(
        setting="min_similarity",
        reason="low_similarity",
        looks_at=("similarity",),
        measure=_SIMILARITY,
        refuses=_least(_SIMILARITY),
    ),
    Bound(setting="languages", reason="other_language", looks_at=("language",), refuses=_other_language),
    Bound(
        setting="min_caption_chars",
        reason="short_caption",
        measure=_CHARS,
        refuses=_least(_CHARS),
    ),
    Bound(
        setting="max_caption_chars",
        reason="long_caption",
        measure=_CHARS,
        refuses=_most(_CHARS),
    ),
    Bound(
        setting="min_caption_words",
        reason="few_words",
        measure=_WORDS,
        refuses=_least(_WORDS),
    ),
    Bound(
        setting="min_latin_share",
        reason="other_script",
        measure=_LATIN,
        refuses=_least(_LATIN),
    ),
)
"""Every bound of `Selection`, in the order of the checks; the first that refuses a row names the reason.

What is cheap to know of a picture comes before what is said of it, and that before the caption.
"""

MEASURES: Final = tuple(dict.fromkeys(bound.measure for bound in BOUNDS if bound.measure is not None))
"""What bounds look at, each once."""
