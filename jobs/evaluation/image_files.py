"""Writing generated images with how they were made: one file each or a sheet, never over another file."""

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import count
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

FORMATS: Final = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
"""Formats by the ending of a file's name."""
_MIN_DISPLAY_SIDE: Final = 256
_EXIF_FOLDER, _USER_COMMENT = 0x8769, 0x9286
_QUALITY: Final = 95


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What an image was made with.

    Attributes:
        negative: caption of the unconditional input (Eq. 3); "" is the empty one.
        steps: of the sampler.
        sampler: by name.
        guidance: w of Eq. 3.
        model: its source.
    """

    negative: str
    steps: int
    sampler: str
    guidance: float
    model: str


@dataclass(frozen=True, kw_only=True)
class GeneratedImage:
    """An image and how it was made.

    Attributes:
        pixels: uint8 [H,W,3].
        caption: that it was generated from.
        seed: of the noise.
        index: among the images of its caption and seed.
        origin: what it was made with.
        flagged: whether a safety checker marked it, so that its pixels are black.
    """

    pixels: np.ndarray
    caption: str
    seed: int
    index: int
    origin: Origin
    flagged: bool = False

    def parameters(self) -> str:
        """Describe how the image was made, in the form that other tools for Stable Diffusion read."""
        height, width = self.pixels.shape[:2]
        origin = self.origin
        negative = f"Negative prompt: {origin.negative}\n" if origin.negative else ""
        return (
            f"{self.caption}\n{negative}Steps: {origin.steps}, Sampler: {origin.sampler.upper()}, "
            f"CFG scale: {origin.guidance:g}, Seed: {self.seed}, Size: {width}x{height}, "
            f"Model: {Path(origin.model).name}, Image: {self.index}"
        )


def save_images(images: Sequence[GeneratedImage], path: Path, *, sheet: bool) -> list[Path]:
    """Save images, small ones enlarged; return the files.

    Args:
        images: one or more, all of one size.
        path: its ending names the format (`FORMATS`). Each of several files gets a number, and a name that
            is taken the next free one.
        sheet: whether all go into one file, a row for each caption.

    Raises:
        OSError: if a file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if sheet:
        rows = [
            np.concatenate([image.pixels for image in images if image.caption == caption], axis=1)
            for caption in dict.fromkeys(image.caption for image in images)
        ]
        text = "\n\n".join(image.parameters() for image in images)
        return [_save(np.concatenate(rows), path, text=text, side=len(images[0].pixels))]
    names = [path] if len(images) == 1 else [_numbered(path, n) for n in range(len(images))]
    return [
        _save(image.pixels, name, text=image.parameters(), side=len(image.pixels))
        for image, name in zip(images, names, strict=True)
    ]


def _save(pixels: np.ndarray, path: Path, *, text: str, side: int) -> Path:
    """Save pixels with a text under a free name."""
    if path.exists():
        path = next(name for name in (_numbered(path, n) for n in count(1)) if not name.exists())
    with path.open("xb") as file:
        file.write(_encode(pixels, text=text, side=side, ending=path.suffix.lower()))
    return path


def png_of(image: GeneratedImage) -> bytes:
    """The content of the PNG file that `save_images` writes for an image."""
    return _encode(image.pixels, text=image.parameters(), side=len(image.pixels), ending=".png")


def _encode(pixels: np.ndarray, *, text: str, side: int, ending: str) -> bytes:
    """Pixels with a text as a file of a format, enlarged if images of this side are."""
    factor = _factor(side)
    image = Image.fromarray(pixels.repeat(factor, axis=0).repeat(factor, axis=1))
    options: dict[str, Any] = {"quality": _QUALITY, "exif": _exif(text)}
    if FORMATS[ending] == "PNG":
        info = PngInfo()
        info.add_text("parameters", text)
        options = {"pnginfo": info}
    file = BytesIO()
    image.save(file, format=FORMATS[ending], **options)
    return file.getvalue()


def describe_size(images: Sequence[GeneratedImage]) -> str:
    """Say how many images there are, of what size, and how much larger they are saved."""
    side = len(images[0].pixels)
    enlarged = f", shown {_factor(side)} times larger" if _factor(side) > 1 else ""
    return f"{len(images)} of {side} px{enlarged}"


def _factor(side: int) -> int:
    """Return how many times larger images of this side, in pixels, are saved."""
    return max(1, _MIN_DISPLAY_SIDE // side)


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.stem}-{number}{path.suffix}")


def _exif(text: str) -> Image.Exif:
    exif = Image.Exif()
    exif.get_ifd(_EXIF_FOLDER)[_USER_COMMENT] = b"UNICODE\0" + text.encode("utf-16-be")
    return exif
