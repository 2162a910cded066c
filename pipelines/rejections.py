"""Rows that are set aside: a closed list of reasons, the exception that gives one, and the record kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

REASONS: Final[dict[str, str]] = {
    # The shard or the list.
    "torn_shard": "the file breaks off or is corrupt here; one record stands for those that nothing counts",
    "bad_sidecar": "the Parquet file beside the tar cannot be read; rows that only it knows are not counted",
    "download_failed": "img2dataset could not download the picture; only the sidecar knows the row",
    "resize_failed": "img2dataset could not decode or resize the picture; only the sidecar knows the row",
    "missing_sample": "the sidecar promises the row, and the tar, though whole, lacks it",
    "unsafe_name": "a member's name is absolute, climbs out of its folder or is absurdly long",
    "not_a_file": "a member is a link, a device or a pipe",
    "oversized_member": "a member is larger than the settings allow, and was not read",
    "duplicate_key": "an earlier row has the same key, or the row's members do not stand together",
    "missing_image": "no member is a picture, or its column is empty",
    "bad_metadata": "the metadata is there but cannot be read, so what it says against the row is unknown",
    "missing_url": "the row of a URL list has no URL",
    "bad_url": "the URL is not text, or is none that can be fetched: http and https are",
    "repeated_url": "an earlier row of the URL lists has the same URL",
    "bad_row": "the line or row of a caption list does not have the form of its format, or lacks its id",
    # The caption.
    "missing_caption": "no caption anywhere",
    "empty_caption": "the caption holds no visible character",
    "bad_encoding": "the caption is not UTF-8",
    # The picture.
    "empty_image": "the picture has no bytes",
    "not_an_image": "the picture is in no format that is accepted",
    "broken_image": "the picture's data is torn or corrupt",
    "unsupported_pixels": "the pixels have no agreed range or colours, for example 32-bit floats",
    "too_many_pixels": "the header announces more pixels than the settings allow; they were not decoded",
    "too_small": "the picture's shorter side is below the settings' bound",
    # The selection.
    "low_resolution": "width or height is below the selection's bound",
    "low_aesthetic": "the aesthetic score is below the selection's bound",
    "watermarked": "the probability of a watermark is above the selection's bound",
    "unsafe": "the probability or the tag of unsafe content is above the selection's bound",
    "low_similarity": "the similarity of picture and caption is below the selection's bound",
    "short_caption": "the caption is shorter than the selection's bound",
    "short_side": "the shorter side is below the selection's bound",
    "extreme_aspect": "longer side over shorter side is above the selection's bound",
    "other_language": "the language is not among those that the selection wants",
    "long_caption": "the caption is longer than the selection's bound",
    "few_words": "the caption has fewer words than the selection's bound",
    "other_script": "the share of Latin letters in the caption is below the selection's bound",
    # The blocklists.
    "blocked_domain": "the picture's host, or a domain above it, is on the blocklist of domains",
    "blocked_hash": "a hash of the picture or of the row is on the blocklist of hashes",
    "blocked_term": "the caption holds a term of the blocklist of terms",
    # A request to forget.
    "withheld": "the row is on the run's list of what is forgotten, so nothing was made of it",
    "forgotten": "the row was made, and taken out again on request; its id is hidden behind a hash",
    # Copies; "of" in the detail says which row came first.
    "evaluation_image": "the picture, or one that looks like it, or its address, is in the evaluation",
    "evaluation_caption": "the caption is in the evaluation, apart from case and punctuation",
    "duplicate_url": "an earlier row has the same address",
    "duplicate_image": "an earlier row has the same bytes of a picture",
    "near_duplicate_image": "an earlier row has a picture that looks like this one",
    "duplicate_caption": "an earlier row has the same caption, apart from case and punctuation",
    # The model and the process.
    "not_finite": "the network put out NaN or infinity",
    "crashed": "the row ended the process that worked on it, at every try",
    "timed_out": "the row took longer than the settings allow, at every try",
}
"""Every reason and its meaning. Reports and tables count by these words, so they are never renamed."""

MAX_DETAIL_CHARS: Final = 300


@dataclass(frozen=True, kw_only=True)
class Rejection:
    """A row that was read and set aside.

    Attributes:
        id: the row's id; unique within its source, except where one bad row copies another's.
        source: name of the shard or caption list that the row stands in.
        reason: a key of `REASONS`.
        detail: what was found, at most 300 characters.
        ordinal: the row's position in its source, from 0.
    """

    id: str
    source: str
    reason: str
    detail: str
    ordinal: int

    def __post_init__(self) -> None:
        if self.reason not in REASONS:
            raise ValueError(f"reason {self.reason!r} is not one of {', '.join(REASONS)}")


class Rejected(Exception):
    """Raised by whatever finds that a row cannot be used; `reason` is a key of `REASONS`.

    Raises:
        ValueError: for a reason that is not on the list.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        if reason not in REASONS:
            raise ValueError(f"reason {reason!r} is not one of {', '.join(REASONS)}")
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = printable(detail)[:MAX_DETAIL_CHARS]

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason

    def record(self, *, id: str, source: str, ordinal: int) -> Rejection:  # noqa: A002 - the column's name
        """The record of this verdict on the row `id`."""
        return Rejection(id=id, source=source, reason=self.reason, detail=self.detail, ordinal=ordinal)


def printable(text: str) -> str:
    """`text` as valid UTF-8 on one line: bytes that were no UTF-8 and control characters are spelled out."""
    valid = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in valid)
