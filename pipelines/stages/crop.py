"""Which part of a picture is kept, and how large it becomes: sizes, aspect buckets, crops.

A picture is scaled until it covers its frame, and what hangs over is cut off. The frame is a square, or the
one of a list of rectangles whose aspect is nearest to the picture's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from pipelines.stages.settings import Buckets, Crop
from snapfusion.settings import SettingsError

Shape = tuple[int, int]
"""Height and width in pixels."""


SIZE_SETTING = "latents.images.size"
_BUCKETS_SETTING = "latents.images.buckets"


def buckets_of(settings: Buckets, *, size: int, step: int) -> tuple[Shape, ...]:
    """The rectangles whose sides are multiples of `step` and whose area is at most that of the square.

    Of each width from `size` on there is one: as high as fits into `size` * `size` pixels, so no bucket takes
    more memory than the square. Each of them stands there upright too. Ordered from tall to wide.

    Raises:
        SettingsError: if the bounds leave no room for the square.
    """
    if settings.min_side is not None and settings.min_side > size:
        raise SettingsError(
            f"{_BUCKETS_SETTING}.min_side is {settings.min_side}; up to the size, {size}, is accepted"
        )
    if settings.max_side is not None and settings.max_side < size:
        raise SettingsError(
            f"{_BUCKETS_SETTING}.max_side is {settings.max_side}; the size, {size}, and more is accepted"
        )
    wide = []
    for width in range(size, size * size // step + 1, step):
        height = size * size // width // step * step
        if width > settings.max_aspect * height:
            break  # wider ones are no higher
        if (settings.max_side or width) >= width and (settings.min_side or height) <= height:
            wide.append((height, width))
    tall = [(width, height) for height, width in reversed(wide) if height != width]
    return (*tall, *wide)


def check_size(size: int, *, step: int, option: str) -> None:
    """Refuse a side that a model cannot halve evenly: one that is no multiple of its granularity `step`.

    Raises:
        SettingsError: which begins with the option.
    """
    if size < step or size % step:
        near = sorted({max(size // step, 1) * step, (size // step + 1) * step})
        raise SettingsError(
            f"{option} is {size}; multiples of {step} are accepted by this model, such as "
            f"{' and '.join(map(str, near))}"
        )


def shapes_of(buckets: Buckets | None, *, size: int, step: int) -> tuple[Shape, ...]:
    """What a picture may become: the square of `size`, or that and the other buckets.

    Raises:
        SettingsError: if the size is no multiple of `step`, or the bounds leave no room for the square.
    """
    check_size(size, step=step, option=SIZE_SETTING)
    return ((size, size),) if buckets is None else buckets_of(buckets, size=size, step=step)


def bucket_for(shapes: Sequence[Shape], *, height: int, width: int) -> Shape:
    """The shape whose aspect is nearest to the picture's by ratio; of two as near, the first.

    Computed in whole numbers, so that every machine chooses alike.
    """
    if len(shapes) == 1:
        return shapes[0]

    def ratio(shape: Shape) -> Fraction:
        one, other = width * shape[0], height * shape[1]
        return Fraction(max(one, other), min(one, other))

    return min(shapes, key=ratio)


def crop_box(
    shape: Shape, *, height: int, width: int, crop: Crop, at: float
) -> tuple[float, float, float, float]:
    """The largest part of a picture that has the shape's aspect: left, top, right, bottom, in its pixels.

    It begins at a whole pixel; its length may be a fraction, so that nothing is stretched.

    Args:
        shape: the frame.
        height: of the picture.
        width: of the picture.
        crop: "center" leaves out as much on both sides; "top" of what is too tall the lower end, where
            portraits have no faces, and of what is too wide both sides; "random" what `at` says.
        at: in [0, 1): where a random crop begins, from the first to the last possible pixel.
    """
    # A square of the shorter side comes out in whole numbers, exactly.
    kept_height = min(float(height), width * shape[0] / shape[1])
    kept_width = min(float(width), height * shape[1] / shape[0])
    left = _offset(width - kept_width, crop="center" if crop == "top" else crop, at=at)
    top = _offset(height - kept_height, crop=crop, at=at)
    # Rounding must not put the end outside.
    return left, top, min(left + kept_width, width), min(top + kept_height, height)


def _offset(slack: float, *, crop: Crop, at: float) -> float:
    if crop == "random":
        return math.floor(at * (math.floor(slack) + 1))
    return 0.0 if crop == "top" else slack // 2
