"""The public data sets of picture URLs and captions as data: their columns, and what each column means.

A layout says how a data set was published. `SPELLINGS` says where a meaning is found in any of them; it is
the one place that does, for links, samples, selection and previews alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, Final, Literal

import pyarrow as pa

Meaning = Literal[
    "url",
    "caption",
    "synthetic_caption",
    "width",
    "height",
    "aesthetic",
    "watermark",
    "unsafe",
    "nsfw_tag",
    "similarity",
    "language",
    "licence",
    "url_text_hash",
    "perceptual_hash",
    "sha256",
    "md5",
    "id",
]
"""What a column may mean."""

SPELLINGS: Final[Mapping[Meaning, tuple[str, ...]]] = {
    "url": ("url", "URL"),
    "caption": ("caption", "TEXT", "text"),
    "synthetic_caption": ("top_caption",),
    # img2dataset's measure of the original, what the data set claims, what lies in the shard.
    "width": ("original_width", "WIDTH", "width"),
    "height": ("original_height", "HEIGHT", "height"),
    "aesthetic": ("aesthetic", "AESTHETIC_SCORE", "aesthetic_score", "aesthetic_score_laion_v2"),
    "watermark": ("pwatermark", "watermark_score"),
    # COYO has two detectors; the less favourable counts.
    "unsafe": ("punsafe", "nsfw_score_opennsfw2", "nsfw_score_gantman"),
    "nsfw_tag": ("NSFW", "nsfw"),
    "similarity": ("similarity", "SIMILARITY", "clip_similarity_vitb32", "clip_similarity_vitl14"),
    "language": ("LANGUAGE", "language"),
    "licence": ("LICENSE", "license"),
    # LAION's: of URL and text, so it tells rows and not pictures.
    "url_text_hash": ("hash",),
    "perceptual_hash": ("image_phash",),
    "sha256": ("sha256",),
    "md5": ("md5",),
    "id": ("SAMPLE_ID", "id"),
}
"""The columns of each meaning, the most trusted first: the first that has a usable value counts.

Of `unsafe` and `nsfw_tag` every column counts, since the least favourable must.
"""

IMAGE_COLUMNS: Final = ("jpg", "jpeg", "png", "webp")
"""What img2dataset calls the column of pictures in its Parquet output: its `encode_format`."""

UNKNOWN: Final = "unknown"

_INTEGERS: Final[frozenset[Meaning]] = frozenset(["id", "width", "height", "url_text_hash"])


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a data set was published.

    Attributes:
        name: of the data set, as people say it.
        columns: name -> Arrow types; the documented one first, then those of copies that went through pandas,
            which makes floats of integers where one is missing.
        optional: columns that not every part or copy has.
    """

    name: str
    columns: Mapping[str, tuple[pa.DataType, ...]]
    optional: frozenset[str] = frozenset()

    def fits(self, names: Iterable[str]) -> int | None:
        """How many of `names` the layout explains; None if it promises a column that is not there."""
        there = set(names)
        if not self.columns.keys() - self.optional <= there:
            return None
        return len(there & self.columns.keys())


_TEXT: Final = (pa.string(),)
_SIZE: Final = (pa.int32(), pa.float64())
_SCORE: Final = (pa.float32(), pa.float64())
_IMG2DATASET: Final[dict[str, tuple[pa.DataType, ...]]] = {
    "caption": _TEXT,
    "url": _TEXT,
    "key": _TEXT,
    "status": _TEXT,
    "error_message": _TEXT,
    "width": (pa.int32(),),
    "height": (pa.int32(),),
    "original_width": (pa.int32(),),
    "original_height": (pa.int32(),),
    "exif": _TEXT,
    "sha256": _TEXT,
    "md5": _TEXT,
}
_IMG2DATASET_OPTIONAL: Final = frozenset(["caption", "exif", "sha256", "md5"])

LAYOUTS: Final = (
    Layout(
        name="LAION-400M",
        columns={
            "SAMPLE_ID": (pa.int64(), pa.float64()),
            "URL": _TEXT,
            "TEXT": _TEXT,
            "HEIGHT": _SIZE,
            "WIDTH": _SIZE,
            "LICENSE": _TEXT,
            "NSFW": _TEXT,
            "similarity": (pa.float64(),),
        },
    ),
    Layout(
        name="LAION-5B",
        columns={
            "SAMPLE_ID": (pa.int64(), pa.float64()),
            "URL": _TEXT,
            "TEXT": _TEXT,
            "HEIGHT": _SIZE,
            "WIDTH": _SIZE,
            "LICENSE": _TEXT,
            "LANGUAGE": _TEXT,
            "NSFW": _TEXT,
            "similarity": (pa.float64(),),
        },
        # laion2B-multi and laion1B-nolang have it, laion2B-en has not.
        optional=frozenset(["LANGUAGE"]),
    ),
    Layout(
        name="laion2B-en-joined",
        columns={
            "URL": _TEXT,
            "TEXT": _TEXT,
            "WIDTH": _SIZE,
            "HEIGHT": _SIZE,
            "similarity": (pa.float64(),),
            "hash": (pa.int64(),),
            "punsafe": _SCORE,
            "pwatermark": _SCORE,
        },
    ),
    Layout(
        name="laion2B-en-aesthetic",
        columns={
            "URL": _TEXT,
            "TEXT": _TEXT,
            "WIDTH": (pa.float64(),),
            "HEIGHT": (pa.float64(),),
            "similarity": (pa.float64(),),
            "hash": (pa.int64(),),
            "punsafe": _SCORE,
            "pwatermark": _SCORE,
            "aesthetic": _SCORE,
        },
    ),
    Layout(
        name="LAION-Aesthetics V2",
        columns={
            "URL": _TEXT,
            "TEXT": _TEXT,
            "WIDTH": (pa.float64(),),
            "HEIGHT": (pa.float64(),),
            "similarity": (pa.float64(),),
            "punsafe": _SCORE,
            "pwatermark": _SCORE,
            "AESTHETIC_SCORE": _SCORE,
            "hash": (pa.int64(),),
            "__index_level_0__": (pa.int64(),),
        },
        optional=frozenset(["__index_level_0__"]),
    ),
    Layout(
        name="laion-coco",
        columns={
            "URL": _TEXT,
            "TEXT": _TEXT,
            "top_caption": _TEXT,
            "all_captions": (pa.list_(pa.string()),),
            "all_similarities": (pa.list_(pa.float64()),),
            "WIDTH": (pa.int64(), pa.float64()),
            "HEIGHT": (pa.int64(), pa.float64()),
            "similarity": (pa.float64(),),
            "hash": (pa.int64(),),
            "pwatermark": (pa.float64(),),
            "punsafe": (pa.float64(),),
        },
    ),
    Layout(
        name="COYO-700M",
        columns={
            "id": (pa.int64(),),
            "url": _TEXT,
            "text": _TEXT,
            "width": (pa.int32(),),
            "height": (pa.int32(),),
            "image_phash": _TEXT,
            "text_length": (pa.int32(),),
            "word_count": (pa.int32(),),
            "num_tokens_bert": (pa.int32(),),
            "num_tokens_gpt": (pa.int32(),),
            "num_faces": (pa.int32(),),
            "clip_similarity_vitb32": (pa.float32(),),
            "clip_similarity_vitl14": (pa.float32(),),
            "nsfw_score_opennsfw2": (pa.float32(),),
            "nsfw_score_gantman": (pa.float32(),),
            "watermark_score": (pa.float32(),),
            "aesthetic_score_laion_v2": (pa.float32(),),
        },
    ),
    Layout(
        name="img2dataset, the sidecar of a tar",
        columns=_IMG2DATASET,
        optional=_IMG2DATASET_OPTIONAL,
    ),
    *(
        Layout(
            name=f"img2dataset, Parquet with {extension} pictures",
            columns={**_IMG2DATASET, extension: (pa.binary(),)},
            optional=_IMG2DATASET_OPTIONAL,
        )
        for extension in ("jpg", "png", "webp")
    ),
)
"""Every layout that is read, with the columns and types that its publishers or faithful copies state."""


def recognise_layout(names: Iterable[str]) -> str:
    """The name of the layout that explains most of these columns; `UNKNOWN` if none fits.

    LAION-400M and the English part of LAION-5B have the same columns; then both are named.
    """
    there = tuple(names)
    fitting = [(explained, layout.name) for layout in LAYOUTS if (explained := layout.fits(there))]
    most = max((explained for explained, _ in fitting), default=0)
    return " or ".join(name for explained, name in fitting if explained == most) or UNKNOWN


def image_column(schema: pa.Schema) -> str | None:
    """The column that holds encoded pictures; None for a list of URLs or a sidecar."""
    for name in IMAGE_COLUMNS:
        if name in schema.names and is_bytes(schema.field(name).type):
            return name
    return None


def is_bytes(kind: pa.DataType) -> bool:
    """Whether a column of this type holds bytes and not text."""
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def values_of(metadata: Mapping[str, Any], meaning: Meaning) -> list[Any]:
    """What the columns of this meaning say, in order of trust; those that are missing or null left out."""
    values = (metadata.get(name) for name in SPELLINGS[meaning])
    return [value for value in values if value is not None]


def numbers_of(metadata: Mapping[str, Any], meaning: Meaning) -> list[float]:
    """The finite numbers among `values_of`."""
    numbers = (as_finite(value) for value in values_of(metadata, meaning))
    return [number for number in numbers if number is not None]


def number_of(metadata: Mapping[str, Any], meaning: Meaning) -> float | None:
    """The most trusted finite number; None where there is none.

    A size counts if it is above 0, since 0 is a way of saying that it is not known. Of unsafe scores the
    highest counts.
    """
    numbers = numbers_of(metadata, meaning)
    if meaning in ("width", "height"):
        return next((number for number in numbers if number > 0), None)
    if meaning == "unsafe":
        return max(numbers, default=None)
    return next(iter(numbers), None)


def texts_of(metadata: Mapping[str, Any], meaning: Meaning) -> list[str]:
    """The strings among `values_of`, without white space at their ends, those that are empty left out."""
    texts = (value.strip() for value in values_of(metadata, meaning) if isinstance(value, str))
    return [text for text in texts if text]


def text_of(metadata: Mapping[str, Any], meaning: Meaning) -> str | None:
    """The most trusted of `texts_of`; None where there is none."""
    return next(iter(texts_of(metadata, meaning)), None)


def as_finite(value: object) -> float | None:
    """A finite number as a float; None for anything else, booleans too."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except OverflowError:  # JSON knows integers of any length
        return None
    return number if math.isfinite(number) else None


def clean_metadata(values: Mapping[str, Any]) -> dict[str, Any]:
    """A row's metadata by its columns: nulls, NaN and bytes (texts that are no UTF-8) are left out.

    An id, a size or a hash that became a float on its way is the integer again that it was.
    """
    mended = ((name, _restore_integer(name, value)) for name, value in values.items())
    return {name: value for name, value in mended if value is not None and not isinstance(value, bytes)}


def _restore_integer(name: str, value: Any) -> Any:  # noqa: ANN401 - any value of a column
    if not isinstance(value, float):
        return value
    if not math.isfinite(value):
        return None
    return int(value) if name in _INTEGER_COLUMNS and value.is_integer() else value


_INTEGER_COLUMNS: Final = frozenset(name for meaning in _INTEGERS for name in SPELLINGS[meaning])
