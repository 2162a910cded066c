"""Share of an image's copies that hash like it, and of other images that do; part of `make bench`.

PICTURES names a folder of photographs; without it images are made by formula, which are smoother.
"""

import io
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from copy_inputs import photograph
from PIL import Image, ImageEnhance

from pipelines.stages.fingerprint import phash
from pipelines.stages.image import open_image
from pipelines.stages.settings import ImageBounds
from pipelines.tables.schemas import to_png
from snapfusion.mini.scenes import captioned_image

BOUNDS = ImageBounds()
DISTANCES = (0, 2, 4, 6, 8)


def encoded(image: Image.Image, *, quality: int = 90, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=quality)
    return buffer.getvalue()


def shorter(image: Image.Image, side: int) -> Image.Image:
    ratio = side / min(image.size)
    width, height = (round(length * ratio) for length in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def cut(image: Image.Image, part: float) -> Image.Image:
    (width, height), half = image.size, part / 2
    return image.crop(
        (int(width * half), int(height * half), int(width * (1 - half)), int(height * (1 - half)))
    )


def middle(image: Image.Image) -> Image.Image:
    (width, height), side = image.size, min(image.size)
    left, top = (width - side) // 2, (height - side) // 2
    return image.crop((left, top, left + side, top + side))


COPIES: dict[str, Callable[[Image.Image], bytes]] = {
    "JPEG, quality 75": lambda image: encoded(image, quality=75),
    "JPEG, quality 30": lambda image: encoded(image, quality=30),
    "WebP, quality 50": lambda image: encoded(image, quality=50, kind="WEBP"),
    "shorter side 256": lambda image: encoded(shorter(image, 256)),
    "shorter side 128": lambda image: encoded(shorter(image, 128)),
    "grey": lambda image: encoded(image.convert("L").convert("RGB")),
    "contrast 0.8": lambda image: encoded(ImageEnhance.Contrast(image).enhance(0.8)),
    "brightness 1.2": lambda image: encoded(ImageEnhance.Brightness(image).enhance(1.2)),
    "1 % cut off": lambda image: encoded(cut(image, 0.01)),
    "2 % cut off": lambda image: encoded(cut(image, 0.02)),
    "5 % cut off": lambda image: encoded(cut(image, 0.05)),
    "10 % cut off": lambda image: encoded(cut(image, 0.10)),
    "middle square": lambda image: encoded(middle(image)),
    "mirrored": lambda image: encoded(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
}


def hashes(files: list[bytes]) -> np.ndarray:
    return np.array([phash(data, images=BOUNDS) for data in files]).view(np.uint64)


def given_files() -> list[bytes]:
    folder = os.environ.get("PICTURES")
    if folder is None:
        return [encoded(photograph(n, side=480)) for n in range(100)]
    return [path.read_bytes() for path in sorted(Path(folder).rglob("*.jp*g"))]


@pytest.mark.slow
def test_copies_keep_their_phash(capsys):
    files = given_files()
    images = [open_image(data, bounds=BOUNDS) for data in files]
    began = time.process_time()
    own = hashes(files)
    each = (time.process_time() - began) / len(files)
    pixels = np.mean([image.width * image.height for image in images])
    found = {
        name: np.bitwise_count(hashes([copy(image) for image in images]) ^ own)
        for name, copy in COPIES.items()
    }
    apart = np.bitwise_count(own[:, None] ^ own[None])[np.triu_indices(len(own), 1)]
    scenes = hashes([to_png(captioned_image(n)[0]) for n in range(2000)])
    near = np.bitwise_count(scenes[:, None] ^ scenes[None]) * np.tri(len(scenes), k=-1, dtype=np.uint8)
    near[np.triu_indices(len(scenes))] = 64
    with capsys.disabled():
        print(f"\n{1e3 * each:.1f} ms to decode and hash an image of {pixels / 1e6:.2f} megapixels")
        print(f"{len(files)} images; part of the copies within {DISTANCES} bits")
        for name, distance in found.items():
            print(f"  {name:18}", *(f"{np.mean(distance <= most):6.3f}" for most in DISTANCES))
        print(f"pairs of {len(apart)} different ones", *(int(np.sum(apart <= most)) for most in DISTANCES))
        print("scenes of 2000 like an earlier", *(int((near <= m).any(1).sum()) for m in DISTANCES))
    for name in ("JPEG, quality 75", "WebP, quality 50", "shorter side 256", "grey", "contrast 0.8"):
        assert np.mean(found[name] <= 4) > 0.98
    assert np.mean(apart <= 4) < 1e-4
