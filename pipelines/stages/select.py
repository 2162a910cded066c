"""Which rows are wanted, by what their metadata say of them, in any of the public spellings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any, Final, Literal

from pydantic import Field

from pipelines.rejection import Rejected
from snapfusion.settings import Settings

# In order of trust: img2dataset's measure of the original, what the dataset claims, what lies in the shard.
_WIDTH: Final = ("original_width", "WIDTH", "width")
_HEIGHT: Final = ("original_height", "HEIGHT", "height")
_AESTHETIC: Final = ("aesthetic", "AESTHETIC_SCORE", "aesthetic_score", "aesthetic_score_laion_v2")
_WATERMARK: Final = ("pwatermark", "watermark_score")
# COYO has two detectors; the less favourable counts.
_UNSAFE: Final = ("punsafe", "nsfw_score_opennsfw2", "nsfw_score_gantman")
_SIMILARITY: Final = ("similarity", "SIMILARITY", "clip_similarity_vitb32", "clip_similarity_vitl14")
_TAG: Final = ("NSFW", "nsfw")


class Selection(Settings):
    """Bounds on metadata; None and () ask for nothing. A value equal to its bound is wanted.

    Attributes:
        min_width: pixels of the original picture.
        min_height: pixels of the original picture.
        min_aesthetic: LAION's aesthetic score, about 1 to 10.
        max_watermark: probability of a watermark.
        max_unsafe: probability of unsafe content; of several detectors the highest.
        min_similarity: cosine of CLIP's picture and text features.
        min_caption_chars: length of the caption.
        refused_tags: values of LAION's NSFW column that are refused.
    """

    min_width: int | None = Field(None, ge=1)
    min_height: int | None = Field(None, ge=1)
    min_aesthetic: float | None = None
    max_watermark: float | None = Field(None, ge=0, le=1)
    max_unsafe: float | None = Field(None, ge=0, le=1)
    min_similarity: float | None = Field(None, ge=-1, le=1)
    min_caption_chars: int | None = Field(None, ge=1)
    refused_tags: tuple[Literal["UNLIKELY", "UNSURE", "NSFW"], ...] = ()


def check(metadata: Mapping[str, Any], *, caption: str, selection: Selection) -> None:
    """Let a row pass, or say why it is not wanted. What is missing, null or NaN never speaks against a row.

    Raises:
        Rejected: `low_resolution`, `low_aesthetic`, `watermarked`, `unsafe`, `low_similarity` or
            `short_caption`; the first in this order.
    """
    _at_least(_size(metadata, _WIDTH), selection.min_width, reason="low_resolution", what="width")
    _at_least(_size(metadata, _HEIGHT), selection.min_height, reason="low_resolution", what="height")
    _at_least(_first(metadata, _AESTHETIC), selection.min_aesthetic, reason="low_aesthetic", what="score")
    _at_most(_first(metadata, _WATERMARK), selection.max_watermark, reason="watermarked")
    _at_most(max(_numbers(metadata, _UNSAFE), default=None), selection.max_unsafe, reason="unsafe")
    _check_tag(metadata, selection.refused_tags)
    _at_least(
        _first(metadata, _SIMILARITY), selection.min_similarity, reason="low_similarity", what="similarity"
    )
    _at_least(len(caption), selection.min_caption_chars, reason="short_caption", what="length")


def _numbers(metadata: Mapping[str, Any], names: Iterable[str]) -> list[float]:
    """The finite numbers under these names, in their order."""
    numbers = (_finite(metadata.get(name)) for name in names)
    return [number for number in numbers if number is not None]


def _finite(value: object) -> float | None:
    if not isinstance(value, Real) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except OverflowError:  # JSON knows integers of any length
        return None
    return number if math.isfinite(number) else None


def _first(metadata: Mapping[str, Any], names: Iterable[str]) -> float | None:
    return next(iter(_numbers(metadata, names)), None)


def _size(metadata: Mapping[str, Any], names: Iterable[str]) -> float | None:
    # A size of zero is a way of saying that it is not known.
    return next((number for number in _numbers(metadata, names) if number > 0), None)


def _at_least(value: float | None, bound: float | None, *, reason: str, what: str) -> None:
    if value is not None and bound is not None and value < bound:
        raise Rejected(reason, f"{what} {value:g} is below {bound:g}")


def _at_most(value: float | None, bound: float | None, *, reason: str) -> None:
    if value is not None and bound is not None and value > bound:
        raise Rejected(reason, f"probability {value:g} is above {bound:g}")


def _check_tag(metadata: Mapping[str, Any], refused: tuple[str, ...]) -> None:
    for name in _TAG:
        tag = metadata.get(name)
        if isinstance(tag, str) and tag.strip().upper() in refused:
            raise Rejected("unsafe", f"tagged {tag}")
