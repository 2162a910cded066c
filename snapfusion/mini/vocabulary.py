"""Vocabulary of the miniature's captions, with the geometry and colors that it stands for."""

import math

IMAGE_SIZE = 32
"""Side in pixels."""

SIZES = {"small": 0.17, "large": 0.27}
"""Half the object's width, relative to the image's."""

COLORS = {
    "red": (220, 30, 40),
    "orange": (250, 135, 20),
    "yellow": (245, 225, 50),
    "green": (40, 165, 65),
    "blue": (35, 75, 220),
    "purple": (135, 40, 170),
}
"""RGB, likewise the backgrounds'."""

POSITIONS = {
    "at the top": (0.5, 0.28),
    "at the bottom": (0.5, 0.72),
    "on the left": (0.28, 0.5),
    "on the right": (0.72, 0.5),
    "in the center": (0.5, 0.5),
}
"""The object's center, from the left and from the top, relative to the image's width."""

BACKGROUNDS = {
    "white": (243, 243, 243),
    "black": (22, 22, 22),
    "gray": (128, 128, 128),
    "pink": (250, 180, 205),
}

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "size": tuple(SIZES),
    "color": tuple(COLORS),
    "shape": ("circle", "square", "triangle", "cross", "ring"),
    "position": tuple(POSITIONS),
    "background": tuple(BACKGROUNDS),
}
"""The values of each attribute, in the order of the fields of `Scene`."""

STORED_NAMES = tuple("place" if name == "position" else name for name in ATTRIBUTES)
"""The attributes as the oracle's weights and published figures name them, in the same order."""

NUM_CAPTIONS = math.prod(map(len, ATTRIBUTES.values()))
"""Number of different captions: 1200."""

ORACLE_FEATURES = 128
"""Length of the oracle's feature vector, which the miniature's FID is computed from."""
