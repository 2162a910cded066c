"""Constants of metric networks that settings refer to."""

from typing import Literal

INCEPTION_FEATURES = 2048
"""Length of Inception's feature vector."""

INCEPTION_SIZE = 299
"""Side of Inception's input in pixels."""

Resize = Literal["bicubic", "bilinear"]
"""bicubic: antialiased, with a kernel that widens when shrinking (Parmar et al. 2022). bilinear: of two by
two pixels, as pytorch-fid does it, which aliases when it shrinks by more than two."""

Preference = Literal["pickscore", "hpsv2"]
"""Scores by networks that were trained on which images people prefer."""

LpipsNetwork = Literal["alex", "vgg"]
"""Backbones of LPIPS: AlexNet, and VGG of 16 layers."""
