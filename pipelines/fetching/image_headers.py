"""Checks an image's format, size and completeness by its bytes, before any decoder sees it.

A decoder allocates what a header announces, and each format it knows is one more attack surface, so only the
formats of the web pass. Truncated images are rejected here, because some decoders fill the rest with grey.
"""

import struct
from collections.abc import Callable
from typing import Final

from pipelines.fetching.causes import FetchError

_JPEG_ALONE: Final = frozenset([0x01, *range(0xD0, 0xD8)])
_JPEG_FRAMES: Final = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_SCAN: Final = 0xDA
_AVIF_HEADER: Final = 1 << 16


def check_image(data: bytes, *, max_pixels: int) -> None:
    """Check that an image may be given to a decoder.

    Raises:
        FetchError: `empty`, `not_an_image`, `broken_image` or `too_many_pixels`.
    """
    if not data:
        raise FetchError("empty")
    read_size = next((reader for matches, reader in _READERS if matches(data)), None)
    if read_size is None:
        raise FetchError("not_an_image", f"begins with {data[:12]!r}")
    try:
        width, height = read_size(data)
    except (struct.error, IndexError):
        raise FetchError("broken_image", "the header breaks off") from None
    if width < 1 or height < 1:
        raise FetchError("broken_image", f"{width} x {height} pixels")
    if width * height > max_pixels:
        raise FetchError("too_many_pixels", f"{width} x {height}")


_Size = tuple[int, int]


def _jpeg_size(data: bytes) -> _Size:
    size: _Size | None = None
    position = 2
    while True:
        position += 1
        marker = data[position]
        if data[position - 1] != 0xFF or marker in (0x00, 0xFF):  # padding, or bytes that decoders skip
            continue
        position += 1
        if marker in _JPEG_ALONE:
            continue
        (length,) = struct.unpack_from(">H", data, position)
        if marker in _JPEG_FRAMES:
            height, width = struct.unpack_from(">HH", data, position + 3)
            size = (width, height)
        position += max(length, 2)
        if marker == _JPEG_SCAN:
            break
    # Within a scan FF D9 cannot occur: a data byte FF is followed by 00.
    if data.find(b"\xff\xd9", position) < 0:
        raise FetchError("broken_image", "a JPEG without its end")
    if size is None:
        raise FetchError("broken_image", "a JPEG without a frame")
    return size


def _png_size(data: bytes) -> _Size:
    if data[12:16] != b"IHDR":
        raise FetchError("broken_image", "a PNG without its header")
    width, height = struct.unpack_from(">II", data, 16)
    if data.find(b"IEND", 24) < 0:
        raise FetchError("broken_image", "a PNG without its end")
    return width, height


def _gif_size(data: bytes) -> _Size:
    width, height = struct.unpack_from("<HH", data, 6)
    return width, height


def _bmp_size(data: bytes) -> _Size:
    (header,) = struct.unpack_from("<I", data, 14)
    if header == 12:
        width, height = struct.unpack_from("<HH", data, 18)
    else:
        width, height = struct.unpack_from("<ii", data, 18)
    return abs(width), abs(height)


def _webp_size(data: bytes) -> _Size:
    (length,) = struct.unpack_from("<I", data, 4)
    if len(data) < length + 8:
        raise FetchError("broken_image", "a WebP without its end")
    kind = data[12:16]
    if kind == b"VP8X":
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    width, height = struct.unpack_from("<HH", data, 26)
    return width & 0x3FFF, height & 0x3FFF


def _avif_size(data: bytes) -> _Size:
    """The largest size that its items announce: the tiles of a grid are smaller than the image."""
    largest, position = (0, 0), data.find(b"ispe", 0, _AVIF_HEADER)
    while position >= 0:
        width, height = struct.unpack_from(">II", data, position + 8)
        largest = max(largest, (width, height), key=lambda size: size[0] * size[1])
        position = data.find(b"ispe", position + 4, _AVIF_HEADER)
    return largest


_READERS: Final[tuple[tuple[Callable[[bytes], bool], Callable[[bytes], _Size]], ...]] = (
    (lambda data: data.startswith(b"\xff\xd8\xff"), _jpeg_size),
    (lambda data: data.startswith(b"\x89PNG\r\n\x1a\n"), _png_size),
    (lambda data: data[:4] == b"RIFF" and data[8:12] == b"WEBP", _webp_size),
    (lambda data: data.startswith((b"GIF87a", b"GIF89a")), _gif_size),
    (lambda data: data[4:8] == b"ftyp" and data[8:12] in (b"avif", b"avis"), _avif_size),
    (lambda data: data.startswith(b"BM") and len(data) > 26, _bmp_size),
)
