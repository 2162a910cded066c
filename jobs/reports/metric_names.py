"""Names of metrics, and of the networks behind CLIP scores and FID, as a page gives them beside a number."""

from collections.abc import Mapping
from typing import Any, Final

from snapfusion.metrics.settings import INCEPTION_FEATURES
from snapfusion.mini.vocabulary import ORACLE_FEATURES

METRIC_NAMES: Final = {
    "fid": "FID",
    "kid": "KID",
    "clip": "CLIP",
    "pickscore": "PickScore",
    "hpsv2": "HPSv2",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
    "spread_within": "spread of a caption",
    "lpips_within": "LPIPS of a caption",
    "all_attributes": "all attributes",
}
"""Metrics of a point of an evaluation by their keys, in order of the columns."""


def metrics_in(point: Mapping[str, Any]) -> dict[str, str]:
    """The metrics that a point has: names by their keys."""
    return {key: name for key, name in METRIC_NAMES.items() if key in point}


def scorer_name(network: str) -> str:
    """The network that a CLIP score is computed with, from `ScorerSettings.network`."""
    return "the bundled miniature's CLIP scorer" if network == "mini" else f"open_clip's {network}"


def features_name(network: str) -> str:
    """The features that FID compares, from `FeatureSettings.network`."""
    if network == "oracle":
        return f"the bundled miniature's oracle, {ORACLE_FEATURES} features"
    return f"Inception v3, {INCEPTION_FEATURES:,} features"
