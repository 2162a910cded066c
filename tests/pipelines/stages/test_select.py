import math
from decimal import Decimal
from typing import Any

import numpy as np
import pytest

from pipelines.rejections import REASONS, Rejected
from pipelines.stages.select import BOUNDS, check, silent_bounds
from pipelines.stages.settings import Selection
from snapfusion.settings import SettingsError

STRICT = Selection(
    min_width=256, min_height=256, min_aesthetic=5.0, max_watermark=0.5, max_unsafe=0.1, min_similarity=0.28,
    min_caption_chars=5, refused_tags=("NSFW", "UNSURE"),
)  # fmt: skip


def reason_of(
    metadata: dict[str, Any], *, caption: str = "a text", selection: Selection = STRICT
) -> str | None:
    try:
        check(metadata, caption=caption, selection=selection)
    except Rejected as rejected:
        return rejected.reason
    return None


@pytest.mark.parametrize(
    ("name", "good", "bad", "reason"),
    [
        ("WIDTH", 256, 255, "low_resolution"),
        ("width", 256.0, 255.0, "low_resolution"),
        ("original_width", np.int32(256), np.int32(255), "low_resolution"),
        ("HEIGHT", 256.0, 255.9, "low_resolution"),
        ("height", 256, 255, "low_resolution"),
        ("original_height", 256, 255, "low_resolution"),
        ("aesthetic", 5.0, 4.9, "low_aesthetic"),
        ("AESTHETIC_SCORE", np.float32(5), np.float32(4.9), "low_aesthetic"),
        ("aesthetic_score_laion_v2", 5, 4, "low_aesthetic"),
        ("pwatermark", 0.5, 0.51, "watermarked"),
        ("watermark_score", 0.5, 0.51, "watermarked"),
        ("punsafe", 0.1, 0.11, "unsafe"),
        ("nsfw_score_opennsfw2", 0.1, 0.11, "unsafe"),
        ("nsfw_score_gantman", 0.1, 0.11, "unsafe"),
        ("NSFW", "UNLIKELY", "UNSURE", "unsafe"),
        ("NSFW", "UNLIKELY", "NSFW", "unsafe"),
        ("nsfw", "unlikely", " nsfw", "unsafe"),
        ("similarity", 0.28, 0.27, "low_similarity"),
        ("clip_similarity_vitb32", 0.28, 0.27, "low_similarity"),
        ("clip_similarity_vitl14", 0.28, 0.27, "low_similarity"),
    ],
)
def test_bounds_in_all_column_names(name: str, good: object, bad: object, reason: str) -> None:
    assert reason_of({name: good}) is None
    assert reason_of({name: bad}) == reason
    assert reason_of({name: bad}, selection=Selection()) is None


NAMES = [
    "WIDTH", "HEIGHT", "width", "height", "original_width", "original_height", "aesthetic", "AESTHETIC_SCORE",
    "pwatermark", "punsafe", "similarity",
]  # fmt: skip


@pytest.mark.parametrize("value", [None, math.nan, np.float32("nan"), "", " ", "nan"])
def test_unknown_values_never_reject(value: object) -> None:
    assert reason_of(dict.fromkeys([*NAMES, "NSFW", "LANGUAGE"], value)) is None
    assert reason_of({}) is None


@pytest.mark.parametrize("value", ["high", True, [], {}, math.inf, -math.inf, 10**400, "1e999", b"0.5"])
@pytest.mark.parametrize("name", NAMES)
def test_values_that_cannot_be_compared_are_rejected(name: str, value: object) -> None:
    assert reason_of({name: value}) == "bad_metadata"
    assert reason_of({name: value}, selection=Selection()) is None


def test_numbers_may_be_text_or_decimal() -> None:
    assert [reason_of({"punsafe": value}) for value in ("0.05", " 0.99", Decimal("0.99"))] == [
        None, "unsafe", "unsafe",
    ]  # fmt: skip
    assert reason_of({"WIDTH": "255"}) == "low_resolution"


def test_one_incomparable_detector_or_tag_rejects() -> None:
    detectors = {"nsfw_score_opennsfw2": 0.05, "nsfw_score_gantman": "high"}
    assert reason_of(detectors) == "bad_metadata"
    assert reason_of({"NSFW": "UNLIKELY", "nsfw": True}) == "bad_metadata"
    # Of other meanings the first usable value counts.
    assert reason_of({"aesthetic": "high", "AESTHETIC_SCORE": 5.0}) is None


def test_size_of_zero_is_unknown() -> None:
    assert reason_of({"WIDTH": 0, "HEIGHT": -1}) is None
    assert reason_of({"original_width": 0, "WIDTH": 100}) == "low_resolution"


def test_measured_original_size_counts_first() -> None:
    assert reason_of({"original_width": 1024, "WIDTH": 100, "width": 100}) is None
    assert reason_of({"original_width": math.nan, "WIDTH": 1024, "width": 100}) is None
    assert reason_of({"original_width": None, "WIDTH": None, "width": 100}) == "low_resolution"


def test_highest_unsafe_probability_counts() -> None:
    assert reason_of({"nsfw_score_opennsfw2": 0.01, "nsfw_score_gantman": 0.9}) == "unsafe"


def test_size_is_checked_before_the_caption() -> None:
    assert reason_of({}, caption="abcd") == "short_caption"
    assert reason_of({"punsafe": 0.9, "WIDTH": 10}, caption="") == "low_resolution"


def test_detail_has_value_and_bound() -> None:
    with pytest.raises(Rejected, match=r"watermarked: watermark probability 0\.75 is above 0\.5"):
        check({"pwatermark": 0.75}, caption="a", selection=STRICT)


def test_unknown_tags_are_refused() -> None:
    assert Selection.parse({"refused_tags": ["NSFW"]}).refused_tags == ("NSFW",)
    with pytest.raises(SettingsError, match="refused_tags"):
        Selection.parse({"refused_tags": ["BAD"]})


SHAPE = Selection(min_side=200, max_aspect=3.0)
CAPTION = Selection(min_caption_chars=6, max_caption_chars=20, min_caption_words=3, min_latin_share=0.8)
LANGUAGE = Selection(languages=("en", "De"))


@pytest.mark.parametrize(
    ("selection", "metadata", "reason"),
    [
        (SHAPE, {"WIDTH": 300, "HEIGHT": 200}, None),
        (SHAPE, {"WIDTH": 200, "HEIGHT": 600}, None),
        (SHAPE, {"WIDTH": 199, "HEIGHT": 400}, "short_side"),
        (SHAPE, {"WIDTH": 400, "HEIGHT": 199.0}, "short_side"),
        (SHAPE, {"HEIGHT": 199}, "short_side"),
        (SHAPE, {"WIDTH": 601, "HEIGHT": 200}, "extreme_aspect"),
        (SHAPE, {"WIDTH": 200, "HEIGHT": 601}, "extreme_aspect"),
        (SHAPE, {"WIDTH": 6000}, None),
        (SHAPE, {"WIDTH": 6000, "HEIGHT": 0}, None),
        (SHAPE, {}, None),
        (LANGUAGE, {"LANGUAGE": "en"}, None),
        (LANGUAGE, {"LANGUAGE": "EN"}, None),
        (LANGUAGE, {"LANGUAGE": " de "}, None),
        (LANGUAGE, {"LANGUAGE": "vi"}, "other_language"),
        (LANGUAGE, {"LANGUAGE": None}, None),
        (LANGUAGE, {"LANGUAGE": ""}, None),
        (LANGUAGE, {"LANGUAGE": 7}, "bad_metadata"),
    ],
)
def test_bounds_on_shape_and_language(selection: Selection, metadata: dict, reason: str | None) -> None:
    assert reason_of(metadata, selection=selection) == reason


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        ("a red circle", None),
        ("a red", "short_caption"),
        ("a red circle and much more", "long_caption"),
        ("redcircle", "few_words"),
        ("красный a круг", "other_script"),
        ("a café, naïve Øre", None),
        ("ａ ｒｅｄ ｃｉｒ", None),
        ("12 345 678", None),
        ("mi x д", "other_script"),
        ("mix mix д", None),
    ],
)
def test_bounds_on_captions(caption: str, reason: str | None) -> None:
    assert reason_of({}, caption=caption, selection=CAPTION) == reason


# The order of the checks.


def test_every_setting_has_one_bound_in_order() -> None:
    assert [bound.setting for bound in BOUNDS] == [
        "min_width", "min_height", "min_side", "max_aspect", "min_aesthetic", "max_watermark", "max_unsafe",
        "refused_tags", "min_similarity", "languages", "min_caption_chars", "max_caption_chars",
        "min_caption_words", "min_latin_share",
    ]  # fmt: skip
    assert {bound.setting for bound in BOUNDS} == set(Selection.model_fields)
    assert {bound.reason for bound in BOUNDS} <= set(REASONS)


def test_first_violated_bound_gives_the_reason() -> None:
    everything = Selection(
        min_width=256, min_height=256, min_side=300, max_aspect=2.0, min_aesthetic=5.0, max_watermark=0.5,
        max_unsafe=0.1, refused_tags=("NSFW",), min_similarity=0.28, languages=("en",), min_caption_chars=5,
        max_caption_chars=6, min_caption_words=2, min_latin_share=0.9,
    )  # fmt: skip
    metadata: dict[str, Any] = {
        "width": 10, "height": 100, "aesthetic": 1, "pwatermark": 1, "punsafe": 1, "NSFW": "NSFW",
        "similarity": 0, "LANGUAGE": "vi",
    }  # fmt: skip
    better = [
        {"width": 260, "height": 270}, {"width": 1000, "height": 400}, {"height": 1000}, {"aesthetic": 6},
        {"pwatermark": 0}, {"punsafe": 0}, {"NSFW": "UNLIKELY"}, {"similarity": 1}, {"LANGUAGE": "en"},
    ]  # fmt: skip
    steps = [*(("дddd", change) for change in [{}, *better]), ("ддddддд", {}), ("ддddд", {}), ("дд ddд", {})]
    found = []
    for caption, change in steps:
        metadata.update(change)
        found.append(reason_of(metadata, caption=caption, selection=everything))
    assert found == [
        "low_resolution", "short_side", "extreme_aspect", "low_aesthetic", "watermarked", "unsafe", "unsafe",
        "low_similarity", "other_language", "short_caption", "long_caption", "few_words", "other_script",
    ]  # fmt: skip


def test_caption_bounds_are_never_silent() -> None:
    selection = Selection(min_caption_chars=5, min_latin_share=0.5, min_side=1, max_aspect=2, max_unsafe=0.5)
    assert silent_bounds(selection, []) == ["min_side", "max_aspect", "max_unsafe"]
    assert silent_bounds(selection, ["WIDTH", "height", "nsfw_score_gantman"]) == []
    assert silent_bounds(Selection(), []) == []
