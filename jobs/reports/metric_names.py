"""Names of the networks behind CLIP scores and FID, as a page gives them beside a number."""

from snapfusion.metrics.settings import INCEPTION_FEATURES
from snapfusion.mini.vocabulary import ORACLE_FEATURES


def scorer_name(network: str) -> str:
    """The network that a CLIP score is computed with, from `ScorerSettings.network`."""
    return "the bundled miniature's CLIP scorer" if network == "mini" else f"open_clip's {network}"


def features_name(network: str) -> str:
    """The features that FID compares, from `FeatureSettings.network`."""
    if network == "oracle":
        return f"the bundled miniature's oracle, {ORACLE_FEATURES} features"
    return f"Inception v3, {INCEPTION_FEATURES:,} features"
