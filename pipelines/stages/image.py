"""Decodes the bytes of an image into RGB pixels of the size that the autoencoder reads."""

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

# Those that img2dataset writes and browsers show; none that starts another program, such as EPS.
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
    """The bytes of an image with the id of their row, which seeds a random crop."""

    row: str

    def __new__(cls, data: bytes, *, row: str = "") -> Self:
        """The bytes, with the id beside them."""
        encoded = super().__new__(cls, data)
        encoded.row = row
        return encoded


@dataclass(frozen=True, kw_only=True)
class CropImage:
    """Decodes an `EncodedImage` and crops it to the best of `shapes`: uint8 [H,W,3], RGB.

    Raises:
        Rejected: as `decode_image`.
    """

    settings: ImageSettings
    shapes: tuple[Shape, ...]

    def __call__(self, image: EncodedImage) -> np.ndarray:
        """Decode and crop."""
        settings, at = self.settings, 0.0
        if settings.crop == "random":
            at = float(uniform(noise_key("crop", settings.crop_seed, image.row), 1)[0])
        return _decode(image, shapes=self.shapes, bounds=settings, crop=settings.crop, at=at)


def decode_image(data: bytes, *, size: int, settings: ImageBounds) -> np.ndarray:
    """The center square of an image, its shorter side resized to `size`: uint8 [size, size, 3], RGB.

    Takes the first frame of an animation, turns by the EXIF tag, puts transparency over white and scales
    16-bit gray to 8 bits. Color profiles are not applied. The kernel is Lanczos, widened when shrinking so
    that nothing aliases: the default of diffusers' image processor.

    Raises:
        Rejected: `empty_image`, `not_an_image`, `too_many_pixels`, `too_small`, `broken_image` or
            `unsupported_pixels`.
    """
    return _decode(data, shapes=((size, size),), bounds=settings, crop="center", at=0.0)


def _decode(
    data: bytes, *, shapes: Sequence[Shape], bounds: ImageBounds, crop: Crop, at: float
) -> np.ndarray:
    image = open_image(data, bounds=bounds)
    width, height = image.size
    shape = bucket_for(shapes, height=height, width=width)
    box = crop_box(shape, height=height, width=width, crop=crop, at=at)
    # One resampling of the cropped part: equal to scaling first and cropping second, and less work.
    return np.array(image.resize((shape[1], shape[0]), Image.Resampling.LANCZOS, box=box))


def open_image(data: bytes, *, bounds: ImageBounds) -> Image.Image:
    """The whole image, decoded to RGB; see `decode_image`.

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
    # By the header alone: a decompression bomb must not be decoded to be found.
    if width * height > settings.max_pixels:
        raise Rejected("too_many_pixels", f"{width} x {height}, {settings.max_pixels} pixels are allowed")
    if min(width, height) < settings.min_side:
        raise Rejected("too_small", f"{width} x {height}, {settings.min_side} is the shortest side allowed")


def _load(image: Image.Image) -> None:
    """Decode every pixel now, so that a broken image is rejected here and not where pixels are first used."""
    try:
        image.load()
    except MemoryError:
        raise  # not the row's fault: sizes are bounded
    except Exception as error:  # noqa: BLE001 - hostile bytes make format plugins raise whatever they meet
        raise Rejected("broken_image", f"{type(error).__name__}: {error}") from None


def _upright(image: Image.Image) -> Image.Image:
    # After loading: Pillow turns a TIFF while loading it, and then drops the tag.
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
        # Pillow would copy all pixels of what is RGB.
        return image if image.mode == "RGB" else image.convert("RGB")
    except (ValueError, OSError) as error:
        raise Rejected("unsupported_pixels", f"{image.mode}: {error}") from None


def _high_bytes(image: Image.Image) -> np.ndarray:
    """16-bit gray as uint8 [H, W], scaled by 255 / 65535 and rounded."""
    wide = np.asarray(image).astype(np.uint32)
    return ((wide * 255 + 32767) // 65535).astype(np.uint8)
