"""Known layouts of public image-caption data sets: their columns, and what each column means.

A layout states how a data set was published. `SPELLINGS` alone states which columns carry a meaning, for
URL lists, samples, selection and previews.
"""

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from numbers import Real
from typing import Any, Final, Literal

import pyarrow as pa

from pipelines.rejections import printable
from pipelines.sources import SourceError

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
"""The meanings that a column may have."""

SPELLINGS: Final[Mapping[Meaning, tuple[str, ...]]] = {
    "url": ("url", "URL"),
    "caption": ("caption", "TEXT", "text", "prompt", "Prompt"),
    "synthetic_caption": ("top_caption",),
    # What img2dataset measured of the original, what the data set claims, the size in the shard.
    "width": ("original_width", "WIDTH", "width"),
    "height": ("original_height", "HEIGHT", "height"),
    "aesthetic": ("aesthetic", "AESTHETIC_SCORE", "aesthetic_score", "aesthetic_score_laion_v2"),
    "watermark": ("pwatermark", "watermark_score"),
    # COYO has two detectors; the higher score counts.
    "unsafe": ("punsafe", "nsfw_score_opennsfw2", "nsfw_score_gantman"),
    "nsfw_tag": ("NSFW", "nsfw"),
    "similarity": ("similarity", "SIMILARITY", "clip_similarity_vitb32", "clip_similarity_vitl14"),
    "language": ("LANGUAGE", "language"),
    "licence": ("LICENSE", "license"),
    # LAION's hash of URL and text: it identifies rows, not images.
    "url_text_hash": ("hash",),
    "perceptual_hash": ("image_phash",),
    "sha256": ("sha256",),
    "md5": ("md5",),
    "id": ("SAMPLE_ID", "id"),
}
"""The columns of each meaning, the most trusted first: the first with a usable value counts.

Of `unsafe` and `nsfw_tag` all columns count, because the least favourable value decides.
"""

IMAGE_COLUMNS: Final = ("jpg", "jpeg", "png", "webp", "image")
"""Names of the image column: img2dataset's, which are its `encode_format`, and Hugging Face's."""

UNKNOWN: Final = "unknown"
_MAX_NAMED_CHARS: Final = 500


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The published form of a data set.

    Attributes:
        name: the data set's usual name.
        columns: Arrow types by name: the documented type first, then that of copies that went through pandas,
            which turns integers into floats where one is missing.
        optional: columns that not every part or copy has.
    """

    name: str
    columns: Mapping[str, tuple[pa.DataType, ...]]
    optional: frozenset[str] = frozenset()

    def fits(self, names: Iterable[str]) -> int | None:
        """Number of `names` that the layout explains; None if a required column is missing."""
        given = set(names)
        if not self.columns.keys() - self.optional <= given:
            return None
        return len(given & self.columns.keys())


_TYPES: Final = {
    "text": (pa.string(),),
    "size": (pa.int32(), pa.float64()),
    "score": (pa.float32(), pa.float64()),
    "int64-or-float": (pa.int64(), pa.float64()),
    "texts": (pa.list_(pa.string()),),
    "floats": (pa.list_(pa.float64()),),
}


def _layout(name: str, columns: str) -> Layout:
    """A layout from the text `name:type name:type ...`, Arrow's types or ours; without a type it is text.

    A question mark after its name marks an optional column.
    """
    pairs = (column.partition(":") for column in columns.replace("?", "").split())
    types = {column: _TYPES.get(kind or "text") or (pa.type_for_alias(kind),) for column, _, kind in pairs}
    return Layout(name=name, columns=types, optional=frozenset(re.findall(r"(\w+)\?", columns)))


_IMG2DATASET: Final = (
    "caption? url key status error_message width:int32 height:int32 original_width:int32 "
    "original_height:int32 exif? sha256? md5?"
)

LAYOUTS: Final = (
    _layout(
        "LAION-400M",
        "SAMPLE_ID:int64-or-float URL TEXT HEIGHT:size WIDTH:size LICENSE NSFW similarity:float64",
    ),
    _layout(
        "LAION-5B",
        # laion2B-multi and laion1B-nolang have a language, laion2B-en has not.
        "SAMPLE_ID:int64-or-float URL TEXT HEIGHT:size WIDTH:size LICENSE LANGUAGE? NSFW similarity:float64",
    ),
    _layout(
        "laion2B-en-joined",
        "URL TEXT WIDTH:size HEIGHT:size similarity:float64 hash:int64 punsafe:score pwatermark:score",
    ),
    _layout(
        "laion2B-en-aesthetic",
        "URL TEXT WIDTH:float64 HEIGHT:float64 similarity:float64 hash:int64 punsafe:score pwatermark:score "
        "aesthetic:score",
    ),
    _layout(
        "LAION-Aesthetics V2",
        "URL TEXT WIDTH:float64 HEIGHT:float64 similarity:float64 punsafe:score pwatermark:score "
        "AESTHETIC_SCORE:score hash:int64 __index_level_0__?:int64",
    ),
    _layout(
        "laion-coco",
        "URL TEXT top_caption all_captions:texts all_similarities:floats WIDTH:int64-or-float "
        "HEIGHT:int64-or-float similarity:float64 hash:int64 pwatermark:float64 punsafe:float64",
    ),
    _layout(
        "COYO-700M",
        "id:int64 url text width:int32 height:int32 image_phash text_length:int32 word_count:int32 "
        "num_tokens_bert:int32 num_tokens_gpt:int32 num_faces:int32 clip_similarity_vitb32:float32 "
        "clip_similarity_vitl14:float32 nsfw_score_opennsfw2:float32 nsfw_score_gantman:float32 "
        "watermark_score:float32 aesthetic_score_laion_v2:float32",
    ),
    _layout("img2dataset, the sidecar of a tar", _IMG2DATASET),
    *(
        _layout(f"img2dataset, Parquet with {extension} images", f"{_IMG2DATASET} {extension}:binary")
        for extension in ("jpg", "png", "webp")
    ),
)
"""Every known layout, with the columns and types that its publishers or faithful copies state."""


def recognise_layout(names: Iterable[str]) -> str:
    """The name of the layout that explains most of these columns; `UNKNOWN` if none fits.

    LAION-400M and the English part of LAION-5B have the same columns; then both are named.
    """
    columns = tuple(names)
    fitting = [(explained, layout.name) for layout in LAYOUTS if (explained := layout.fits(columns))]
    most = max((explained for explained, _ in fitting), default=0)
    return " or ".join(name for explained, name in fitting if explained == most) or UNKNOWN


def image_column(schema: pa.Schema) -> str | None:
    """The column of encoded images; None for a URL list or a sidecar.

    Its values are bytes, or as Hugging Face's datasets library writes them, structs with a field `bytes`.
    """
    return next(
        (name for name in IMAGE_COLUMNS if name in schema.names and _is_image(schema.field(name).type)), None
    )


def _is_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and is_bytes(field.type) for field in kind)
    return is_bytes(kind)


def is_bytes(kind: pa.DataType) -> bool:
    """Whether a column of this type holds bytes, not text."""
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type may hold text, as strings or as bytes.

    A column without a single value may have the type null.
    """
    return bool(
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind) or is_bytes(kind)
    )


def find_column(names: Collection[str], meaning: Meaning, *, given: str | None) -> str:
    """The column of a meaning among these: the given one, or else the most trusted spelling.

    Raises:
        SourceError: if there is none.
    """
    accepted = SPELLINGS[meaning] if given is None else (given,)
    found = next((name for name in accepted if name in names), None)
    if found is None:
        existing = printable(", ".join(names)) or "none"
        if len(existing) > _MAX_NAMED_CHARS:
            existing = f"{existing[:_MAX_NAMED_CHARS]}..."
        raise SourceError(
            f"no {meaning} column named {' or '.join(accepted)}; it has {existing}: set {meaning}_column to "
            "one of them"
        )
    return found


def values_of(metadata: Mapping[str, Any], meaning: Meaning) -> list[Any]:
    """The values of the columns of this meaning in order of trust, without missing and null ones."""
    values = (metadata.get(name) for name in SPELLINGS[meaning])
    return [value for value in values if value is not None]


def number_of(metadata: Mapping[str, Any], meaning: Meaning) -> float | None:
    """The most trusted finite number, also written as text; None if there is none.

    Of widths and heights only positive ones count, because data sets write 0 for an unknown size. Of unsafe
    scores the highest counts.
    """
    values = map(_number, values_of(metadata, meaning))
    numbers = [value for value in values if value is not None and not math.isnan(value)]
    if meaning in ("width", "height"):
        return next((number for number in numbers if number > 0), None)
    if meaning == "unsafe":
        return max(numbers, default=None)
    return next(iter(numbers), None)


def texts_of(metadata: Mapping[str, Any], meaning: Meaning) -> list[str]:
    """The non-empty strings among `values_of`, stripped."""
    texts = (value.strip() for value in values_of(metadata, meaning) if isinstance(value, str))
    return [text for text in texts if text]


def text_of(metadata: Mapping[str, Any], meaning: Meaning) -> str | None:
    """The most trusted of `texts_of`; None if there is none."""
    return next(iter(texts_of(metadata, meaning)), None)


def incomparable_value(metadata: Mapping[str, Any], meaning: Meaning) -> str:
    """A column and value that no bound on this meaning can be compared with; empty if there is none.

    Null, NaN and empty text are unknown, not incomparable. Where the first usable value counts, the others do
    not matter.
    """
    if meaning in _TEXTS:
        is_usable, is_comparable = bool(texts_of(metadata, meaning)), _is_text_or_null
    else:
        is_usable, is_comparable = number_of(metadata, meaning) is not None, _is_number_or_null
    if is_usable and meaning not in _ALL_COUNT:
        return ""
    values = ((name, metadata.get(name)) for name in SPELLINGS[meaning])
    return next((f"{name} {str(value)[:50]!r}" for name, value in values if not is_comparable(value)), "")


_TEXTS: Final = ("nsfw_tag", "language")
_ALL_COUNT: Final = ("unsafe", "nsfw_tag")


def _is_text_or_null(value: object) -> bool:
    return value is None or isinstance(value, str) or value != value  # NaN, pandas' null, differs from itself


def _is_number_or_null(value: object) -> bool:
    return value is None or _number(value) is not None


def _number(value: object) -> float | None:
    """A value as a number that is finite, or NaN where it is not known; None if it is no such number."""
    if isinstance(value, str) and not value.strip():
        return math.nan
    if not isinstance(value, Real | Decimal | str) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (OverflowError, ValueError):  # JSON has integers of any length
        return None
    return None if math.isinf(number) else number


def clean_metadata(values: Mapping[str, Any]) -> dict[str, Any]:
    """A row's metadata by column, without nulls, NaN and bytes (invalid UTF-8).

    An id, a size or a hash that pandas turned into a float becomes an integer again.
    """
    restored = ((name, _restore_integer(name, value)) for name, value in values.items())
    return {name: value for name, value in restored if value is not None and not isinstance(value, bytes)}


def _restore_integer(name: str, value: Any) -> Any:  # noqa: ANN401 - any value of a column
    if not isinstance(value, float):
        return value
    if math.isnan(value):
        return None
    return int(value) if name in _INTEGER_COLUMNS and value.is_integer() else value


_INTEGER_COLUMNS: Final = frozenset(
    name for meaning in ("id", "width", "height", "url_text_hash") for name in SPELLINGS[meaning]
)
