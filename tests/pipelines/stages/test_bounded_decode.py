"""Images whose size does not bound the time that they take to decode."""

import io
import time
from functools import partial

import numpy as np
import pytest
from PIL import Image

from pipelines.rejections import Rejected
from pipelines.stages.bounded_decode import BoundedDecode, may_take_long
from pipelines.stages.image import EncodedImage, decode_image
from pipelines.stages.settings import ImageBounds


def image(kind: str, *, side: int = 64, **options) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((side, side), 40).save(buffer, kind, **options)
    return buffer.getvalue()


def jpeg_of_many_scans(scans: int, *, side: int) -> bytes:
    """A progressive JPEG whose last scan, of few bytes because all pixels are equal, is repeated."""
    buffer = io.BytesIO()
    Image.new("L", (side, side), 90).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * scans + data[-2:]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_usual_images_start_no_process(kind: str) -> None:
    data = image(kind)
    assert not may_take_long(data)
    with BoundedDecode(len, seconds=1.0) as decode:
        assert decode(EncodedImage(data)) == len(data)
        assert decode._isolated._child is None


def test_other_images_are_decoded_within_their_seconds() -> None:
    direct = partial(decode_image, size=32, settings=ImageBounds())
    long = jpeg_of_many_scans(2_000, side=5_000)  # 90 s on one core
    assert len(long) < 1 << 18
    with BoundedDecode(direct, seconds=2.0) as decode:
        for data in (image("TIFF"), image("AVIF"), jpeg_of_many_scans(30, side=64)):
            assert may_take_long(data)
            np.testing.assert_array_equal(decode(EncodedImage(data)), direct(data))
        began = time.monotonic()
        with pytest.raises(Rejected, match="timed_out"):
            decode(EncodedImage(long))
        assert time.monotonic() - began < 20
