"""Rejected rows: the closed list of reasons, the exception that carries one, and the stored record."""

from dataclasses import dataclass
from typing import Final

REASONS: Final[dict[str, str]] = {
    # The shard or the list.
    "torn_shard": "the file is truncated or corrupt here; one record stands for the rows that nothing counts",
    "not_a_shard": "the file is no tar or Parquet file, but what the detail names",
    "changed_shard": "the shard no longer begins with what committed rows were read from; it was not read on",
    "bad_sidecar": "the Parquet file beside the tar cannot be read, or has no row for the sample, or several",
    "download_failed": "img2dataset could not download the image; only the sidecar lists the row",
    "resize_failed": "img2dataset could not decode or resize the image; only the sidecar lists the row",
    "missing_sample": "the sidecar lists the row, but the tar, which is complete, does not contain it",
    "unsafe_name": "a member's name is absolute, leaves its folder or is longer than 1,024 characters",
    "not_a_file": "a member is a link, a device or a pipe",
    "oversized_member": "a member is larger than the settings allow, and was not read",
    "too_many_members": "the sample has more than 1,000 members",
    "duplicate_key": "an earlier row has the same key, or the row's members are not adjacent",
    "missing_image": "no member is an image, or the image column is empty",
    "bad_metadata": "the metadata cannot be parsed or compared, so it is unknown whether it excludes the row",
    "missing_url": "the row of a URL list has no URL",
    "bad_url": "the URL is not valid text, or not an http or https URL with a host",
    "repeated_url": "an earlier row of the URL lists has the same URL",
    "bad_row": "the line or row of a caption list does not have the form of its format, or lacks its id",
    # The caption.
    "missing_caption": "no caption anywhere",
    "empty_caption": "the caption has no visible character",
    "bad_encoding": "the caption is not UTF-8, or contains NUL",
    # The image.
    "empty_image": "the image has no bytes",
    "not_an_image": "the image is in no accepted format",
    "broken_image": "the image data is truncated or corrupt",
    "unsupported_pixels": "the pixels have no agreed range or colours, for example 32-bit floats",
    "too_many_pixels": "the header announces more pixels than the settings allow; they were not decoded",
    "too_small": "the image's shorter side is below the settings' bound",
    # The selection.
    "low_resolution": "width or height is below the selection's bound",
    "low_aesthetic": "the aesthetic score is below the selection's bound",
    "watermarked": "the watermark probability is above the selection's bound",
    "unsafe": "the probability or the tag of unsafe content is above the selection's bound",
    "low_similarity": "the similarity of image and caption is below the selection's bound",
    "short_caption": "the caption is shorter than the selection's bound",
    "short_side": "the shorter side is below the selection's bound",
    "extreme_aspect": "longer side over shorter side is above the selection's bound",
    "other_language": "the language is not one that the selection accepts",
    "long_caption": "the caption is longer than the selection's bound",
    "few_words": "the caption has fewer words than the selection's bound",
    "other_script": "the share of Latin letters in the caption is below the selection's bound",
    # The blocklists.
    "blocked_domain": "the image's host, or a parent domain, is on the blocklist of domains",
    "blocked_hash": "a hash of the image or of the row is on the blocklist of hashes",
    "blocked_term": "the caption contains a term of the blocklist of terms",
    # Deletion requests.
    "withheld": "the row is on the run's deletion list, so it was not processed",
    "forgotten": "the row was written and later removed on request; its id is stored as a hash",
    # Copies; "of" in the detail names the row that came first.
    "evaluation_image": "the image, a near-duplicate of it, or its URL is in the evaluation set",
    "evaluation_caption": "the caption is in the evaluation set, apart from case and punctuation",
    "duplicate_url": "an earlier row has the same URL",
    "duplicate_image": "an earlier row has the same image bytes",
    "near_duplicate_image": "an earlier row has an image that looks like this one",
    "duplicate_caption": "an earlier row has the same caption, apart from case and punctuation",
    # The model and the process.
    "not_finite": "the network returned NaN or infinity",
    "crashed": "the row ended the worker process at every attempt",
    "timed_out": "the row took longer than the settings allow at every attempt",
}
"""Every reason and its meaning. Tables and reports store these keys, so they are never renamed."""

DELETIONS: Final = ("withheld", "forgotten")
"""The reasons that are no fault of a row."""

NOT_SHOWN: Final = (*DELETIONS, "unsafe", "blocked_domain", "blocked_hash", "blocked_term")
"""The reasons of rows that no page gives as an example: deleted, or refused for their content."""

MAX_DETAIL_CHARS: Final = 300


@dataclass(frozen=True, kw_only=True)
class Rejection:
    """The record of a rejected row.

    Attributes:
        id: the row's id; unique within its source, except where one bad row copies another's.
        source: name of the shard or caption list that contains the row.
        reason: a key of `REASONS`.
        detail: particulars, at most 300 characters.
        ordinal: the row's position in its source, from 0.
    """

    id: str
    source: str
    reason: str
    detail: str
    ordinal: int

    def __post_init__(self) -> None:
        _check_reason(self.reason)


class Rejected(Exception):
    """Raised where a row turns out to be unusable; `reason` is a key of `REASONS`.

    Raises:
        ValueError: for a reason that is not in `REASONS`.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        _check_reason(reason)
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = printable(detail)[:MAX_DETAIL_CHARS]

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason

    def record(self, *, id: str, source: str, ordinal: int) -> Rejection:  # noqa: A002 - the column's name
        """The `Rejection` of the row `id`."""
        return Rejection(id=id, source=source, reason=self.reason, detail=self.detail, ordinal=ordinal)


def printable(text: str) -> str:
    """`text` as valid UTF-8 on one line: invalid bytes and control characters become escape sequences."""
    valid = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in valid)


def _check_reason(reason: str) -> None:
    if reason not in REASONS:
        raise ValueError(f"reason {reason!r} is not one of {', '.join(REASONS)}")
