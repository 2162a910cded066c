"""Constants of the metrics that settings refer to."""

from __future__ import annotations

from typing import Literal

FEATURES = 2048


SIDE = 299
"""Pixels a side of the network's input."""


Resize = Literal["bicubic", "bilinear"]
"""bicubic: widened when shrinking, so that nothing aliases (Parmar et al. 2022). bilinear: of two by two
pixels, as pytorch-fid does it, which aliases when it shrinks by more than two."""
