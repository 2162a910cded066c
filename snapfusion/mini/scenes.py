"""Procedural captioned scenes of one object: image and caption are pure functions of an index.

There are 1200 captions (2 sizes x 6 colors x 5 shapes x 5 positions x 4 backgrounds), each with many images:
position, size, rotation and color vary slightly with the index, and the background has a slight gradient.
Indexes below `HELD_OUT` are for training, those from `HELD_OUT` on for evaluation. Both have the same 1200
captions; only the images are held out.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace

import numpy as np
import torch
from torch import Tensor

from snapfusion.mini.captions import TEMPLATE
from snapfusion.mini.split import Split, captions_in
from snapfusion.mini.vocabulary import (
    ATTRIBUTES,
    BACKGROUNDS,
    COLORS,
    IMAGE_SIZE,
    NUM_CAPTIONS,
    POSITIONS,
    SIZES,
)
from snapfusion.noise import noise_key, uniform

HELD_OUT = 2**32
"""The first index for evaluation."""

_DRAWS = 12
"""Uniform numbers per image."""


def _circle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.hypot(x, y) - 1.0


def _square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(x), np.abs(y)) - 0.88


def _triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    sloped = 0.866 * np.abs(x) - 0.5 * y  # the apex is at the top: y grows downwards
    return np.maximum(sloped, y) - 0.56


def _cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    long, short = np.maximum(np.abs(x), np.abs(y)), np.minimum(np.abs(x), np.abs(y))
    return np.maximum(long - 1.0, short - 0.34)


def _ring(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.abs(np.hypot(x, y) - 0.76) - 0.24


SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "cross": _cross,
    "ring": _ring,
}
"""Approximate signed distance to each outline, negative inside, in units of half the object's width."""


@dataclass(frozen=True)
class Scene:
    """The attributes of a caption, each a value of `ATTRIBUTES`."""

    size: str
    color: str
    shape: str
    position: str
    background: str

    def labels(self) -> tuple[int, ...]:
        """The index of each attribute's value within `ATTRIBUTES`, in the order of the fields."""
        pairs = zip(ATTRIBUTES.values(), astuple(self), strict=True)
        return tuple(words.index(word) for words, word in pairs)


_STRIDE = 457
"""Coprime with 1200, so that neighbours differ in most attributes and every caption occurs."""


def scene_of(index: int) -> Scene:
    """The scene at `index` >= 0; any 1200 consecutive scenes are different.

    Raises:
        ValueError: for a negative index.
    """
    if index < 0:
        raise ValueError(f"scene index is {index}; 0 or more is accepted")
    rest, labels = index * _STRIDE % NUM_CAPTIONS, []
    for words in ATTRIBUTES.values():
        rest, label = divmod(rest, len(words))
        labels.append(label)
    return scene_from_labels(labels)


def scene_from_labels(labels: Sequence[int]) -> Scene:
    """The scene whose `labels()` these are."""
    return Scene(*(words[label] for words, label in zip(ATTRIBUTES.values(), labels, strict=True)))


def caption_of(scene: Scene) -> str:
    """The caption, such as "a large red circle at the top on a white background"."""
    return TEMPLATE.format(**vars(scene))


def parse_caption(caption: str) -> Scene:
    """The scene with this caption; the inverse of `caption_of`.

    Raises:
        ValueError: if the caption is not one of the 1200.
    """
    scenes = _scenes_by_caption()
    if caption not in scenes:
        raise ValueError(f"{caption!r} describes no scene; an example that does is {next(iter(scenes))!r}")
    return scenes[caption]


@functools.cache
def _scenes_by_caption() -> dict[str, Scene]:
    return {caption_of(scene): scene for scene in map(scene_of, range(NUM_CAPTIONS))}


@functools.cache
def numbers_in(split: Split | None) -> tuple[int, ...]:
    """Numbers of a split's captions, increasing; of all 1200 for None. Scene i has number i modulo 1200."""
    if split is None:
        return tuple(range(NUM_CAPTIONS))
    captions = set(captions_in(split))
    return tuple(number for number in range(NUM_CAPTIONS) if caption_of(scene_of(number)) in captions)


def held_out_index(position: int, *, split: Split | None) -> int:
    """Index, above `HELD_OUT`, of a held-out scene of a split: each of its captions once, then once again."""
    numbers = _held_out_numbers(split)
    repeat, rest = divmod(position, len(numbers))
    return repeat * NUM_CAPTIONS + numbers[rest]


@functools.cache
def _held_out_numbers(split: Split | None) -> list[int]:
    # HELD_OUT is no multiple of 1200: its caption has another number than 0.
    return sorted((number - HELD_OUT) % NUM_CAPTIONS for number in numbers_in(split))


def changes_of(scene: Scene) -> list[Scene]:
    """All scenes with another value of one attribute."""
    every = [(name, word) for name, words in ATTRIBUTES.items() for word in words]
    return [replace(scene, **{name: word}) for name, word in every if word != getattr(scene, name)]


def change_one_attribute(scene: Scene, *, draw: float) -> Scene:
    """`scene` with another value of one attribute: of all such changes, the one at `draw` in [0, 1)."""
    scenes = changes_of(scene)
    return scenes[int(draw * len(scenes))]


def render(scene: Scene, *, key: int, size: int = IMAGE_SIZE) -> np.ndarray:
    """The image: uint8 [size, size, 3], RGB, anti-aliased.

    Args:
        scene: to render.
        key: determines the variation; see `snapfusion.noise.noise_key`.
        size: side in pixels.
    """
    # The number and order of the draws are part of the bundled weights' recipe: a change alters every image.
    draw = 2.0 * uniform(key, _DRAWS) - 1.0
    centers = (np.arange(size) + 0.5) / size
    left, top = POSITIONS[scene.position]
    half = SIZES[scene.size] * (1.0 + 0.08 * draw[0])
    x = (centers - left - 0.025 * draw[1])[None, :] / half
    y = (centers - top - 0.025 * draw[2])[:, None] / half
    angle = 0.2 * draw[3]
    turned_x, turned_y = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    distance = SHAPES[scene.shape](turned_x, turned_y) * half * size
    cover = np.clip(0.5 - distance, 0.0, 1.0)[..., None]
    slope = 8.0 * (draw[4] * centers[None, :] + draw[5] * centers[:, None])[..., None]
    ground = np.array(BACKGROUNDS[scene.background]) + 6.0 * draw[6] + slope
    color = np.array(COLORS[scene.color]) * (1.0 + 0.06 * draw[7]) + 8.0 * draw[8:11]
    image = cover * color + (1.0 - cover) * ground
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def captioned_image(index: int, *, seed: int = 0) -> tuple[np.ndarray, str]:
    """Image, uint8 [32, 32, 3], and caption at `index`: a pure function of its arguments."""
    scene = scene_of(index)
    return render(scene, key=noise_key("scene", seed, index)), caption_of(scene)


def image_batch(indexes: Sequence[int]) -> Tensor:
    """The images at `indexes`: uint8 [B, 3, 32, 32]."""
    images = np.stack([captioned_image(index)[0] for index in indexes])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def to_signed(images: Tensor) -> Tensor:
    """uint8 images as float32 in [-1, 1], same shape."""
    return images.float() / 127.5 - 1.0
