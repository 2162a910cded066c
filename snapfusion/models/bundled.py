"""The miniatures in this package; importable without torch."""

from pathlib import Path

_WEIGHTS = Path(__file__).parents[1] / "mini" / "weights"
BUNDLED = {"mini": _WEIGHTS / "sd", "mini-v": _WEIGHTS / "sd-v"}
"""Their folders by name: one predicts eps, one v (SnapFusion Eq. 6)."""
