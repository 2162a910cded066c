"""From the bytes of a picture to the RGB image of a given size that the autoencoder reads."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Self

import numpy as np
from PIL import Image, UnidentifiedImageError

from pipelines.rejections import Rejected
from pipelines.stages.crop import Shape, bucket_for, crop_box
from pipelines.stages.settings import Crop, ImageBounds, ImageSettings
from snapfusion.noise import noise_key, uniform

# What img2dataset writes and the web shows. Left out are formats that start other programs, such as EPS.
FORMATS: Final = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
_ORIENTATION: Final = 0x0112
_UPRIGHT: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class EncodedImage(bytes):
    """The bytes of a picture, which know the id of their row: a random crop follows from it."""

    row: str

    def __new__(cls, data: bytes, *, row: str = "") -> Self:
        """Those bytes."""
        made = super().__new__(cls, data)
        made.row = row
        return made


@dataclass(frozen=True, kw_only=True)
class CropImage:
    """`EncodedImage` in, the picture in the one of `shapes` that fits it out: uint8 [H,W,3], RGB.

    Raises:
        Rejected: as `decode_image`.
    """

    settings: ImageSettings
    shapes: tuple[Shape, ...]

    def __call__(self, picture: EncodedImage) -> np.ndarray:
        """Decode and frame."""
        settings, at = self.settings, 0.0
        if settings.crop == "random":
            at = float(uniform(noise_key("crop", settings.crop_seed, picture.row), 1)[0])
        return _decode(picture, shapes=self.shapes, bounds=settings, crop=settings.crop, at=at)


def decode_image(data: bytes, *, size: int, settings: ImageBounds) -> np.ndarray:
    """The centre square of a picture, its shorter side made `size`: uint8 [size, size, 3], RGB.

    The first frame of an animation; upright by its EXIF tag; transparency over white; 16-bit grey scaled to
    8 bits. Colour profiles are not applied. The kernel is Lanczos, widened when shrinking so that nothing
    aliases: the default of diffusers' image processor, so a picture enters the autoencoder as it does there.

    Raises:
        Rejected: `empty_image`, `not_an_image`, `too_many_pixels`, `too_small`, `broken_image` or
            `unsupported_pixels`.
    """
    return _decode(data, shapes=((size, size),), bounds=settings, crop="center", at=0.0)


def _decode(
    data: bytes, *, shapes: Sequence[Shape], bounds: ImageBounds, crop: Crop, at: float
) -> np.ndarray:
    return np.array(_crop(open_image(data, bounds=bounds), shapes=shapes, crop=crop, at=at))


def open_image(data: bytes, *, bounds: ImageBounds) -> Image.Image:
    """The whole picture, decoded and RGB; see `decode_image`.

    Raises:
        Rejected: as `decode_image`.
    """
    if not data:
        raise Rejected("empty_image")
    with _open(data) as image:
        _check_size(image, bounds)
        _load(image)
        return _to_rgb(_upright(image))


def _open(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise Rejected("not_an_image", f"begins with {data[:16]!r}") from None
    except Image.DecompressionBombError as error:
        raise Rejected("too_many_pixels", str(error)) from None
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - see _load
        raise Rejected("broken_image", f"{type(error).__name__}: {error}") from None


def _check_size(image: Image.Image, settings: ImageBounds) -> None:
    width, height = image.size
    if width * height > settings.max_pixels:
        raise Rejected("too_many_pixels", f"{width} x {height}, {settings.max_pixels} pixels are allowed")
    if min(width, height) < settings.min_side:
        raise Rejected("too_small", f"{width} x {height}, {settings.min_side} is the shortest side allowed")


def _load(image: Image.Image) -> None:
    """Decode every pixel, here and not lazily, so that all that can go wrong goes wrong here."""
    try:
        image.load()
    except MemoryError:
        raise  # the machine's fault and not the row's: sizes are bounded
    except Exception as error:  # noqa: BLE001 - hostile bytes make format plugins raise whatever they meet
        raise Rejected("broken_image", f"{type(error).__name__}: {error}") from None


def _upright(image: Image.Image) -> Image.Image:
    # After the load: a TIFF is turned by its loader, which then drops the tag.
    try:
        turn = _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # noqa: BLE001 - a torn EXIF block says nothing about the pixels
        turn = None
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image) -> Image.Image:
    try:
        if image.mode.startswith("I;16"):
            return Image.fromarray(_high_bytes(image)).convert("RGB")
        if image.mode in ("I", "F"):
            raise Rejected("unsupported_pixels", f"{image.mode}: 32-bit pixels of no stated range")
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
        return image.convert("RGB")
    except (ValueError, OSError) as error:
        raise Rejected("unsupported_pixels", f"{image.mode}: {error}") from None


def _high_bytes(image: Image.Image) -> np.ndarray:
    """16-bit grey as uint8 [H, W]: 65535 becomes 255, and the rest is rounded in proportion."""
    wide = np.asarray(image).astype(np.uint32)
    return ((wide * 255 + 32767) // 65535).astype(np.uint8)


def _crop(image: Image.Image, *, shapes: Sequence[Shape], crop: Crop, at: float) -> Image.Image:
    # One resampling of the part that is kept: the same as scaling first and cropping second, and less work.
    width, height = image.size
    shape = bucket_for(shapes, height=height, width=width)
    box = crop_box(shape, height=height, width=width, crop=crop, at=at)
    return image.resize((shape[1], shape[0]), Image.Resampling.LANCZOS, box=box)
