"""What tells whether two rows are the same: keys of address and caption, a hash of bytes, a hash of looks."""

from __future__ import annotations

import hashlib
import time
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Final

import imagehash
import numpy as np
from PIL import Image

from pipelines.rejections import Rejected, Rejection
from pipelines.sources.settings import ShardSettings
from pipelines.sources.webdataset import Sample
from pipelines.stages.image import open_image
from pipelines.stages.read import Decode, ShardWork, Usable, UsableRows
from pipelines.stages.row_filter import RowFilter
from pipelines.stages.settings import ImageBounds, Selection
from pipelines.storage.objects import read_bytes
from pipelines.tables.deletion_list import normalize_url
from pipelines.tables.units import CaptionRows, FinishedRows, ImageNameRows

METHOD: Final = {"keys": "blake2b-64 of normal url and caption, 1", "looks": "imagehash.phash, 8 x 8"}
"""Part of the identity of every table of fingerprints: rows made otherwise cannot be compared."""

_COLUMNS: Final = ("id", "source_id", "url_key", "caption_key", "image_sha256", "phash")

ImageHashes = tuple[str, int]
"""SHA-256 of a picture's bytes as 64 hexadecimal digits, and `phash` of its pixels."""


def url_key(url: str) -> int:
    """64 bits of an address, signed; spellings that `normalize_url` makes equal have the same."""
    return _bits(normalize_url(url))


def caption_key(caption: str) -> int | None:
    """64 bits of a caption's letters, marks and digits, signed; None where it has none.

    Compatible characters are one (NFKC), case is folded, and punctuation and white space are one space.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", caption).casefold())
    kept = "".join(letter if unicodedata.category(letter)[0] in "LMN" else " " for letter in folded)
    words = " ".join(kept.split())
    return _bits(words) if words else None


def phash(data: bytes, *, images: ImageBounds) -> int:
    """64 bits of how the whole picture looks, signed: the signs of its lowest frequencies about their median.

    It is made of luminance alone, scaled to 32 x 32 whatever the shape. `f"{value & (2**64 - 1):016x}"` is
    its usual spelling.

    Raises:
        Rejected: as `open_image`.
    """
    return _hash(open_image(data, bounds=images))


def image_hashes(data: bytes, *, images: ImageBounds) -> ImageHashes:
    """What is compared of a picture.

    Raises:
        Rejected: as `open_image`.
    """
    return hashlib.sha256(data).hexdigest(), phash(data, images=images)


class FingerprintShard:
    """`ShardWork` in, `FinishedRows` of FINGERPRINTS out: a row for each usable row of the shard."""

    def __init__(
        self,
        *,
        rows_per_unit: int,
        shards: ShardSettings,
        images: ImageBounds,
        selection: Selection,
        vetoes: Sequence[RowFilter] = (),
    ) -> None:
        self.rows = UsableRows(
            rows_per_unit=rows_per_unit, shards=shards, selection=selection, vetoes=tuple(vetoes)
        )
        self.decode: Decode[ImageHashes] = partial(image_hashes, images=images)

    def __call__(self, work: ShardWork, *, careful: bool = False) -> Iterator[FinishedRows]:
        """Stream the shard once; memory holds one picture and the keys of one unit."""
        began = time.monotonic()
        units = self.rows.units(work, decode=self.decode, gather=_gather, careful=careful)
        for unit, (columns, rejections) in units:
            now = time.monotonic()
            yield FinishedRows(unit=unit, columns=columns, rejections=rejections, seconds=now - began)
            began = now

    def isolated(self, work: ShardWork) -> Iterator[FinishedRows]:
        """The same after a worker died on this shard."""
        return self(work, careful=True)


class FingerprintImages:
    """`ImageNameRows` in, `FinishedRows` of FINGERPRINTS out; a picture has no caption and goes by its name.

    Args:
        images: bounds on pictures.
        middle: of each only the looks of its middle square, which shards of cropped pictures hold.
    """

    def __init__(self, *, images: ImageBounds, middle: bool = False) -> None:
        self.images = images
        self.middle = middle

    def __call__(self, rows: ImageNameRows) -> FinishedRows:
        """Read and hash all pictures of a unit, one at a time."""
        began = time.monotonic()
        made: list[tuple[Any, ...]] = []
        rejections: list[Rejection] = []
        for position, name in enumerate(rows.names):
            id_ = f"{rows.unit.source}/{name.rpartition('/')[2]}"
            try:
                made.append((id_, name, None, None, *self._looks(read_bytes(name))))
            except Rejected as verdict:
                ordinal = rows.unit.start + position
                rejections.append(verdict.record(id=id_, source=rows.unit.source, ordinal=ordinal))
        return FinishedRows(
            unit=rows.unit,
            columns=_columns(made),
            rejections=rejections,
            seconds=time.monotonic() - began,
        )

    def _looks(self, data: bytes) -> tuple[str | None, int]:
        if not self.middle:
            return image_hashes(data, images=self.images)
        image = open_image(data, bounds=self.images)
        side = min(image.size)
        left, top = ((length - side) // 2 for length in image.size)
        return None, _hash(image.crop((left, top, left + side, top + side)))


class FingerprintCaptions:
    """`CaptionRows` in, `FinishedRows` of FINGERPRINTS out; a caption has no picture and no address."""

    def __call__(self, rows: CaptionRows) -> FinishedRows:
        """The keys of a unit's captions."""
        named = ((f"{rows.unit.source}/{caption.id}", caption) for caption in rows.captions)
        made = [(id_, id_, None, caption_key(caption.text), None, None) for id_, caption in named]
        return FinishedRows(unit=rows.unit, columns=_columns(made), rejections=rows.rejections)


def _gather(rows: Iterator[Usable[ImageHashes] | Rejection]) -> tuple[dict[str, list[Any]], list[Rejection]]:
    made: list[tuple[Any, ...]] = []
    rejections: list[Rejection] = []
    for row in rows:
        if isinstance(row, Rejection):
            rejections.append(row)
        else:
            made.append(
                (
                    row.id,
                    row.sample.source_id,
                    _address(row.sample),
                    caption_key(row.sample.caption),
                    *row.picture,
                )
            )
    return _columns(made), rejections


def _address(sample: Sample) -> int | None:
    # Where the origin is not known the source id is the row's own.
    return None if sample.source_id == sample.id else url_key(sample.source_id)


def _columns(rows: Iterable[tuple[Any, ...]]) -> dict[str, list[Any]]:
    columns = list(zip(*rows, strict=True)) or [()] * len(_COLUMNS)
    return {name: list(values) for name, values in zip(_COLUMNS, columns, strict=True)}


def _hash(image: Image.Image) -> int:
    bits = np.packbits(imagehash.phash(image).hash.flatten())
    return int.from_bytes(bits.tobytes(), "big", signed=True)


def _bits(text: str) -> int:
    data = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)
