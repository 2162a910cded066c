import math
from typing import Any

import numpy as np
import pytest

from pipelines.rejection import Rejected
from pipelines.stages.select import Selection, check
from snapfusion.settings import SettingsError

STRICT = Selection(
    min_width=256,
    min_height=256,
    min_aesthetic=5.0,
    max_watermark=0.5,
    max_unsafe=0.1,
    min_similarity=0.28,
    min_caption_chars=5,
    refused_tags=("NSFW", "UNSURE"),
)


def reason_of(
    metadata: dict[str, Any], *, caption: str = "a caption", selection: Selection = STRICT
) -> str | None:
    try:
        check(metadata, caption=caption, selection=selection)
    except Rejected as verdict:
        return verdict.reason
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
def test_each_bound_in_each_spelling(name: str, good: object, bad: object, reason: str) -> None:
    assert reason_of({name: good}) is None
    assert reason_of({name: bad}) == reason
    assert reason_of({name: bad}, selection=Selection()) is None


@pytest.mark.parametrize(
    "value", [None, math.nan, np.float32("nan"), math.inf, -math.inf, "", "255", True, [], 10**400]
)
def test_what_is_null_nan_or_no_number_never_rejects(value: object) -> None:
    names = [
        "WIDTH", "HEIGHT", "width", "height", "original_width", "original_height", "aesthetic",
        "AESTHETIC_SCORE", "pwatermark", "punsafe", "similarity", "NSFW",
    ]  # fmt: skip
    assert reason_of(dict.fromkeys(names, value)) is None


def test_what_is_missing_never_rejects() -> None:
    assert reason_of({}) is None


def test_a_size_of_zero_is_not_known() -> None:
    assert reason_of({"WIDTH": 0, "HEIGHT": -1}) is None
    assert reason_of({"original_width": 0, "WIDTH": 100}) == "low_resolution"


def test_the_measured_original_counts_before_the_claim_and_the_shard_s_copy() -> None:
    assert reason_of({"original_width": 1024, "WIDTH": 100, "width": 100}) is None
    assert reason_of({"original_width": math.nan, "WIDTH": 1024, "width": 100}) is None
    assert reason_of({"original_width": None, "WIDTH": None, "width": 100}) == "low_resolution"


def test_of_several_unsafe_detectors_the_highest_counts() -> None:
    assert reason_of({"nsfw_score_opennsfw2": 0.01, "nsfw_score_gantman": 0.9}) == "unsafe"


def test_captions_and_the_order_of_reasons() -> None:
    assert reason_of({}, caption="abcd") == "short_caption"
    assert reason_of({"punsafe": 0.9, "WIDTH": 10}, caption="") == "low_resolution"


def test_the_detail_names_value_and_bound() -> None:
    with pytest.raises(Rejected, match=r"watermarked: probability 0\.75 is above 0\.5"):
        check({"pwatermark": 0.75}, caption="a", selection=STRICT)


def test_unknown_tags_are_refused_as_settings() -> None:
    assert Selection.parse({"refused_tags": ["NSFW"]}).refused_tags == ("NSFW",)
    with pytest.raises(SettingsError, match="refused_tags"):
        Selection.parse({"refused_tags": ["BAD"]})
