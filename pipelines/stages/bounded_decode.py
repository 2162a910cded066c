"""Bounds the time that decoding an image may take, at no cost to the images that cannot take long."""

from collections.abc import Callable
from typing import Final, Generic, Self, TypeVar

from pipelines.stages.image import EncodedImage
from pipelines.stages.isolation import Isolation

Decoded = TypeVar("Decoded")

# Encoders write about ten scans; each may pass over all pixels, and a file of few bytes may have thousands.
_MAX_QUICK_SCANS: Final = 20
_SCAN: Final = b"\xff\xda"
# TIFF, whose strips may overlap. That of PNG, WebP, GIF and BMP is proportional to their pixels and bytes.
_SLOW: Final = (b"II", b"MM")


class BoundedDecode(Generic[Decoded]):
    """Calls `decode`, for an image that may take long in a child process; use it in a `with` statement.

    Args:
        decode: of the encoded image; raises `Rejected`. It must pickle by name.
        seconds: after which an image in the child is rejected as `timed_out`.
    """

    def __init__(self, decode: Callable[[EncodedImage], Decoded], *, seconds: float) -> None:
        self._decode = decode
        self._isolated = Isolation(decode, timeout=seconds, tries=1)

    def __call__(self, image: EncodedImage) -> Decoded:
        """The result of `decode`.

        Raises:
            Rejected: as `decode`, or `timed_out` or `crashed`.
        """
        return self._isolated(image) if may_take_long(image) else self._decode(image)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._isolated.close()


def may_take_long(image: bytes) -> bool:
    """Whether its pixels do not bound the time that an image takes: TIFF, AVIF, a JPEG of many scans."""
    if image.startswith(b"\xff\xd8"):
        return image.count(_SCAN) > _MAX_QUICK_SCANS
    # What is in no format of images is rejected by its first bytes.
    return image.startswith(_SLOW) or image[4:8] == b"ftyp"
