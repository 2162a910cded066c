"""Constants of metric networks that settings refer to."""

from typing import Literal

INCEPTION_FEATURES = 2048
"""Length of Inception's feature vector."""

INCEPTION_SIZE = 299
"""Side of Inception's input in pixels."""

Resize = Literal["bicubic", "bilinear"]
"""bicubic: antialiased, with a kernel that widens when shrinking (Parmar et al. 2022). bilinear: of two by
two pixels, as pytorch-fid does it, which aliases when it shrinks by more than two."""
