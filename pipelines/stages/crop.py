"""Chooses sizes, aspect buckets and crops of images.

An image is scaled until it covers its bucket, and cropped to it. The bucket is a square, or the rectangle of
a list whose aspect is nearest to the image's.
"""

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
    """The rectangles, sides multiples of `step` and area at most the square's, from tall to wide.

    One for each width from `size` on, as high as fits into `size` * `size` pixels, so that no bucket needs
    more memory than the square; and the same turned upright.

    Raises:
        SettingsError: if the bounds exclude the square.
    """
    least, most = settings.min_side, settings.max_side
    if least is not None and least > size:
        raise SettingsError(f"{_BUCKETS_SETTING}.min_side is {least}; at most the size, {size}, is accepted")
    if most is not None and most < size:
        raise SettingsError(f"{_BUCKETS_SETTING}.max_side is {most}; at least the size, {size}, is accepted")
    wide = []
    for width in range(size, size * size // step + 1, step):
        height = size * size // width // step * step
        if width > settings.max_aspect * height:
            break  # wider ones are lower still
        if (most or width) >= width and (least or height) <= height:
            wide.append((height, width))
    tall = [(width, height) for height, width in reversed(wide) if height != width]
    return (*tall, *wide)


def check_size(size: int, *, step: int, option: str) -> None:
    """Refuse a side that is no multiple of `step`, the model's granularity: its levels could not halve it.

    Raises:
        SettingsError: with a message that begins with `option`.
    """
    if size < step or size % step:
        near = sorted({max(size // step, 1) * step, (size // step + 1) * step})
        raise SettingsError(
            f"{option} is {size}; multiples of {step} are accepted by this model, such as "
            f"{' and '.join(map(str, near))}"
        )


def shapes_of(buckets: Buckets | None, *, size: int, step: int) -> tuple[Shape, ...]:
    """The shapes that images may be cropped to: the square of `size`, or all buckets.

    Raises:
        SettingsError: if the size is no multiple of `step`, or the bounds exclude the square.
    """
    check_size(size, step=step, option=SIZE_SETTING)
    return ((size, size),) if buckets is None else buckets_of(buckets, size=size, step=step)


def bucket_for(shapes: Sequence[Shape], *, height: int, width: int) -> Shape:
    """The shape whose aspect is nearest to the image's by ratio; the first of two equally near ones."""
    if len(shapes) == 1:
        return shapes[0]

    # In whole numbers: rounding must not make two machines choose differently.
    def ratio(shape: Shape) -> Fraction:
        one, other = width * shape[0], height * shape[1]
        return Fraction(max(one, other), min(one, other))

    return min(shapes, key=ratio)


def crop_box(
    shape: Shape, *, height: int, width: int, crop: Crop, at: float
) -> tuple[float, float, float, float]:
    """The largest part of an image that has the shape's aspect: left, top, right, bottom in pixels.

    It begins at a whole pixel; its length may be fractional, so that nothing is stretched.

    Args:
        shape: of the crop.
        height: of the image.
        width: of the image.
        crop: "center" leaves out as much on both sides; "top" keeps the upper end of a tall image, where
            portraits have faces, and the center of a wide one; "random" begins at `at`.
        at: in [0, 1), from the first to the last possible pixel; used by "random" alone.
    """
    crop_height = min(float(height), width * shape[0] / shape[1])
    crop_width = min(float(width), height * shape[1] / shape[0])
    left = _offset(width - crop_width, crop="center" if crop == "top" else crop, at=at)
    top = _offset(height - crop_height, crop=crop, at=at)
    # Rounding must not put the end outside of the image.
    return left, top, min(left + crop_width, width), min(top + crop_height, height)


def _offset(slack: float, *, crop: Crop, at: float) -> float:
    if crop == "random":
        return math.floor(at * (math.floor(slack) + 1))
    return 0.0 if crop == "top" else slack // 2
