import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from pipelines.rejections import Rejected
from pipelines.stages.image import FORMATS, decode_image
from pipelines.stages.settings import ImageSettings

# Pillow tells of odd headers as warnings; what becomes of the picture is tested here.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
SETTINGS = ImageSettings()
RED, WHITE, GREEN = (200, 30, 40), (255, 255, 255), (20, 180, 60)


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decode(data: bytes, *, size: int = 32, settings: ImageSettings = SETTINGS) -> np.ndarray:
    pixels = decode_image(data, size=size, settings=settings)
    assert (pixels.shape, pixels.dtype) == ((size, size, 3), np.uint8)
    assert pixels.flags.writeable
    assert pixels.flags.c_contiguous
    return pixels


def reason_of(data: bytes, settings: ImageSettings = SETTINGS) -> str:
    with pytest.raises(Rejected) as caught:
        decode(data, settings=settings)
    return caught.value.reason


def noise(width: int = 48, height: int = 40, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def png_with_header(*, width: int, height: int, body: bytes = b"") -> bytes:
    """A PNG that claims a size and holds `body` as its compressed pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


# Geometry.


def test_image_of_the_right_size_is_unchanged() -> None:
    pixels = noise(32, 32)
    assert np.array_equal(decode(encode(Image.fromarray(pixels))), pixels)


def test_center_of_the_longer_side_is_kept() -> None:
    pixels = noise(101, 32)
    assert np.array_equal(decode(encode(Image.fromarray(pixels))), pixels[:, 34:66])
    tall = np.ascontiguousarray(pixels.transpose(1, 0, 2))
    assert np.array_equal(decode(encode(Image.fromarray(tall))), tall[34:66])


@pytest.mark.parametrize("side", [64, 256, 20])
def test_square_equals_resizing_before_cropping(side: int) -> None:
    smooth = Image.fromarray(noise(12, 8)).resize((side * 3 // 2, side), Image.Resampling.BICUBIC)
    reference = smooth.resize((48, 32), Image.Resampling.LANCZOS).crop((8, 0, 40, 32))
    assert np.array_equal(decode(encode(smooth)), np.asarray(reference))


def test_shrinking_does_not_alias() -> None:
    stripes = np.zeros((512, 512, 3), np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(decode(encode(Image.fromarray(stripes))).astype(int)[:, 2:-2] - 127).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied(orientation: int, kind: str) -> None:
    upright = np.zeros((64, 64, 3), np.uint8)
    upright[:32, :32], upright[:32, 32:], upright[32:, :32] = RED, WHITE, GREEN
    # How a camera in that position would have stored it (EXIF 2.3, tag 274).
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: upright.transpose(1, 0, 2), 6: np.rot90(upright), 7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif.tobytes(), **options)
    pixels = decode(data).astype(int)
    for y, x, color in ((8, 8, RED), (8, 24, WHITE), (24, 8, GREEN), (24, 24, (0, 0, 0))):
        assert np.abs(pixels[y, x] - color).max() < 12


def test_torn_exif_is_ignored() -> None:
    for exif in (b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff"):
        decode(encode(Image.new("RGB", (32, 32), RED), "JPEG", exif=exif))


# Colours.


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "CMYK", "L", "LA", "1", "YCbCr"])
def test_all_modes_become_rgb(mode: str) -> None:
    kind = {"CMYK": "TIFF", "YCbCr": "JPEG"}.get(mode, "PNG")
    source = Image.new("RGB", (40, 32), WHITE)
    source.paste((0, 0, 0), (0, 0, 20, 32))
    pixels = decode(encode(source.convert(mode), kind)).astype(int)
    assert np.abs(pixels[:, 1] - 0).max() < 8
    assert np.abs(pixels[:, -2] - 255).max() < 8


def test_cmyk_jpeg_keeps_its_color() -> None:
    pixels = decode(encode(Image.new("RGB", (40, 40), RED).convert("CMYK"), "JPEG", quality=95))
    assert np.abs(pixels.astype(int) - RED).max() < 8


def test_transparent_palette_is_composited_on_white() -> None:
    image = Image.new("P", (32, 32), 1)
    image.putpalette([*GREEN, *RED])
    image.paste(0, (0, 0, 16, 32))
    pixels = decode(encode(image, transparency=0))
    assert (tuple(pixels[5, 3]), tuple(pixels[5, 28])) == (WHITE, RED)


@pytest.mark.parametrize(("mode", "color", "expected"), [("RGBA", (*RED, 0), 255), ("LA", (0, 51), 204)])
def test_transparency_is_composited_on_white(mode: str, color: tuple[int, ...], expected: int) -> None:
    assert (decode(encode(Image.new(mode, (32, 32), color))) == expected).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize(("value", "expected"), [(0, 0), (128, 0), (129, 1), (32768, 128), (65535, 255)])
def test_16_bit_gray_is_scaled(kind: str, value: int, expected: int) -> None:
    image = Image.fromarray(np.full((32, 32), value, np.uint16))
    assert image.mode.startswith("I;16")
    assert (decode(encode(image, kind)) == expected).all()


def test_pixels_without_range_are_rejected() -> None:
    assert reason_of(encode(Image.new("F", (32, 32), 0.5), "TIFF")) == "unsupported_pixels"
    assert reason_of(encode(Image.new("I", (32, 32), 70_000), "TIFF")) == "unsupported_pixels"


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_first_frame_of_an_animation_is_used(kind: str) -> None:
    first, second = (Image.new("RGB", (32, 32), color) for color in (RED, GREEN))
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(first, kind, save_all=True, append_images=[second], **options)
    with Image.open(io.BytesIO(data)) as image:
        assert getattr(image, "n_frames", 1) == 2
    assert np.abs(decode(data).astype(int) - RED).max() < 4


# Bad input.


def test_bytes_that_are_no_image_are_rejected() -> None:
    assert reason_of(b"") == "empty_image"
    assert reason_of(b"<!DOCTYPE html><html>404</html>") == "not_an_image"
    assert reason_of(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n") == "not_an_image"
    assert reason_of(b"\x00" * 100) == "not_an_image"


@pytest.mark.parametrize("kind", FORMATS)
def test_truncated_image_is_rejected(kind: str) -> None:
    data = encode(Image.fromarray(noise(64, 64)), kind)
    decode(data)
    for length in range(1, len(data) * 9 // 10, 97):
        assert reason_of(data[:length]) in ("broken_image", "not_an_image")


@pytest.mark.parametrize("kind", FORMATS)
def test_altered_bytes_decode_or_are_rejected(kind: str) -> None:
    data = encode(Image.fromarray(noise(32, 32)), kind)
    random = np.random.default_rng(1)
    for _ in range(60):
        altered = bytearray(data)
        for index in random.integers(0, len(data), 8):
            altered[index] = random.integers(0, 256)
        try:
            decode(bytes(altered))
        except Rejected:
            continue


def test_small_image_is_rejected() -> None:
    assert reason_of(encode(Image.new("RGB", (1, 1)))) == "too_small"
    assert reason_of(encode(Image.new("RGB", (1, 4000)))) == "too_small"
    assert reason_of(encode(Image.new("RGB", (15, 99)))) == "too_small"
    decode(encode(Image.new("RGB", (16, 16))))
    assert reason_of(encode(Image.new("RGB", (31, 32))), ImageSettings(min_side=32)) == "too_small"


def test_decompression_bomb_is_rejected_by_its_header() -> None:
    # Pixels are never asked for: there are none, and looking for them would end in another reason.
    for side in (6_000, 12_000, 40_000):
        assert reason_of(png_with_header(width=side, height=side)) == "too_many_pixels"
    assert reason_of(png_with_header(width=5_000, height=5_000)) == "broken_image"
    bomb = zlib.compress(bytes(64 * (1 + 3 * 64)), 9)
    small = ImageSettings(max_pixels=64 * 64 - 1)
    assert reason_of(png_with_header(width=64, height=64, body=bomb), small) == "too_many_pixels"
    decode(png_with_header(width=64, height=64, body=bomb), settings=ImageSettings(max_pixels=64 * 64))


def test_text_chunk_bomb_is_rejected() -> None:
    chunk = b"zTXtbomb\0\0" + zlib.compress(bytes(200 << 20), 9)
    data = bytearray(encode(Image.new("RGB", (32, 32))))
    bomb = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    data[33:33] = bomb  # after IHDR
    assert reason_of(bytes(data)) == "broken_image"
