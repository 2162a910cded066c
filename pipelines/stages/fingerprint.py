"""Fingerprints rows for deduplication: keys of URL and caption, a hash of bytes, a perceptual hash."""

import hashlib
import time
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import imagehash
import numpy as np
from PIL import Image

from pipelines.rejections import Rejected, Rejection
from pipelines.sources.webdataset import Sample
from pipelines.stages.image import open_image
from pipelines.stages.read import ShardReader
from pipelines.stages.settings import ImageBounds
from pipelines.stages.shard_work import ShardWork
from pipelines.storage.objects import read_bytes
from pipelines.tables.deletion_list import normalize_url
from pipelines.tables.units import CaptionRows, FinishedRows, ImageNameRows, Unit

METHOD: Final = {"keys": "blake2b-64 of normal url and caption, 1", "looks": "imagehash.phash, 8 x 8"}
"""Part of the identity of every table of fingerprints: rows of another method cannot be compared."""

_COLUMNS: Final = ("id", "source_id", "url_key", "caption_key", "image_sha256", "phash")

ImageHashes = tuple[str, int]
"""SHA-256 of an image's bytes as 64 hexadecimal digits, and `phash` of its pixels."""


def url_key(url: str) -> int:
    """64 bits of a URL, signed; equal for spellings that `normalize_url` makes equal."""
    return _bits(normalize_url(url))


def caption_key(caption: str) -> int | None:
    """64 bits of a caption's letters, marks and digits, signed; None where it has none.

    Compatible characters are unified (NFKC), case is folded, punctuation and white space become one space.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", caption).casefold())
    kept = "".join(letter if unicodedata.category(letter)[0] in "LMN" else " " for letter in folded)
    words = " ".join(kept.split())
    return _bits(words) if words else None


def phash(data: bytes, *, images: ImageBounds) -> int:
    """64 bits of how the whole image looks, signed: its lowest frequencies above or below their median.

    Made from luminance alone, scaled to 32 x 32 whatever the shape. `f"{value & (2**64 - 1):016x}"` is the
    usual spelling.

    Raises:
        Rejected: as `open_image`.
    """
    return _phash(open_image(data, bounds=images))


def image_hashes(data: bytes, *, images: ImageBounds) -> ImageHashes:
    """The hashes by which an image is compared.

    Raises:
        Rejected: as `open_image`.
    """
    return hashlib.sha256(data).hexdigest(), phash(data, images=images)


@dataclass(kw_only=True)
class FingerprintShard(ShardReader[ImageHashes, FinishedRows]):
    """Turns `ShardWork` into `FinishedRows` of FINGERPRINTS, a row for each usable row of the shard."""

    images: ImageBounds

    def __post_init__(self) -> None:
        self.decode = partial(image_hashes, images=self.images)

    def __call__(self, work: ShardWork, *, isolate: bool = False) -> Iterator[FinishedRows]:
        """Stream the shard once; memory holds one image and the keys of one unit."""
        began = time.monotonic()
        for unit in super().__call__(work, isolate=isolate):
            now = time.monotonic()
            yield replace(unit, seconds=now - began)
            began = now

    def row(self, id_: str, sample: Sample, decoded: ImageHashes) -> tuple[Any, ...]:
        """The values of `_COLUMNS`."""
        # Where the URL is not known the source id is the row's own id.
        url = None if sample.source_id == sample.id else url_key(sample.source_id)
        return id_, sample.source_id, url, caption_key(sample.caption), *decoded

    def output(self, unit: Unit, rows: list[tuple[Any, ...]], rejections: list[Rejection]) -> FinishedRows:
        """The unit's fingerprints."""
        return FinishedRows(unit=unit, columns=_columns(rows), rejections=rejections)


class FingerprintImages:
    """Turns `ImageNameRows` into `FinishedRows` of FINGERPRINTS; an image has neither caption nor URL.

    Args:
        images: bounds on images.
        middle: hash the center square alone, because shards of cropped images hold that.
    """

    def __init__(self, *, images: ImageBounds, middle: bool = False) -> None:
        self.images = images
        self.middle = middle

    def __call__(self, rows: ImageNameRows) -> FinishedRows:
        """Read and hash all images of a unit, one at a time."""
        began = time.monotonic()
        fingerprints: list[tuple[Any, ...]] = []
        rejections: list[Rejection] = []
        for name, ordinal in rows.row_keys():
            id_ = f"{rows.unit.source}/{name.rpartition('/')[2]}"
            try:
                fingerprints.append((id_, name, None, None, *self._hashes(read_bytes(name))))
            except Rejected as rejected:
                rejections.append(rejected.record(id=id_, source=rows.unit.source, ordinal=ordinal))
        columns, seconds = _columns(fingerprints), time.monotonic() - began
        return FinishedRows(unit=rows.unit, columns=columns, rejections=rejections, seconds=seconds)

    def _hashes(self, data: bytes) -> tuple[str | None, int]:
        if not self.middle:
            return image_hashes(data, images=self.images)
        image = open_image(data, bounds=self.images)
        side = min(image.size)
        left, top = ((length - side) // 2 for length in image.size)
        return None, _phash(image.crop((left, top, left + side, top + side)))


class FingerprintCaptions:
    """Turns `CaptionRows` into `FinishedRows` of FINGERPRINTS; a caption has neither image nor URL."""

    def __call__(self, rows: CaptionRows) -> FinishedRows:
        """The keys of a unit's captions."""
        texts = [(f"{rows.unit.source}/{caption.id}", caption.text) for caption in rows.captions]
        fingerprints = [(id_, id_, None, caption_key(text), None, None) for id_, text in texts]
        return FinishedRows(unit=rows.unit, columns=_columns(fingerprints), rejections=rows.rejections)


def _columns(rows: Iterable[tuple[Any, ...]]) -> dict[str, list[Any]]:
    columns = list(zip(*rows, strict=True)) or [()] * len(_COLUMNS)
    return {name: list(values) for name, values in zip(_COLUMNS, columns, strict=True)}


def _phash(image: Image.Image) -> int:
    # Signed, because Delta Lake has no unsigned integers.
    bits = np.packbits(imagehash.phash(image).hash.flatten())
    return int.from_bytes(bits.tobytes(), "big", signed=True)


def _bits(text: str) -> int:
    # A URL may hold lone surrogates: every text must have a key.
    data = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)
