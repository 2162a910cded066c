"""Why a picture could not be had: a closed list, told apart by whether a later try may succeed."""

from __future__ import annotations

from typing import Final

TRANSIENT: Final = {
    "timed_out": "the answer was not complete in time",
    "connection_failed": "no connection to the server, or it broke before the answer",
    "cut_short": "the connection ended before the body did",
    "name_server_failed": "the name could not be looked up just now",
    "too_many_requests": "the server answered 429",
    "server_error": "the server answered 5xx",
    "interrupted": "img2dataset itself failed or stood still, with this row unfinished",
}
"""Causes that a later try may find gone, and their meaning."""

PERMANENT: Final = {
    "gone": "the server answered 404 or 410",
    "refused": "the server answered with another status than 200",
    "opted_out": "a header of the answer asks that the picture be not used",
    "private_address": "the name or address is not of the open internet",
    "no_such_host": "the name does not exist",
    "bad_url": "the URL is none that is fetched",
    "bad_redirect": "a redirection leads nowhere, in a circle or too far",
    "bad_answer": "the answer is not HTTP as it should be",
    "bad_certificate": "the server could not prove who it is",
    "too_large": "the answer has more bytes than the settings allow",
    "empty": "the answer has no body",
    "not_an_image": "the body is in no format that is accepted",
    "too_many_pixels": "the picture's header announces more pixels than the settings allow",
    "broken_image": "the picture's data is torn or corrupt",
    "crashed": "the picture took the process that decoded it down, or held it up",
}
"""Causes that stay, and their meaning."""

CAUSES: Final = {**TRANSIENT, **PERMANENT}
"""Every cause. Sidecars and receipts count by these words, so they are never renamed."""

_MAX_DETAIL_CHARS: Final = 120


class FetchError(Exception):
    """Why a picture was not had; its text is what img2dataset writes down as `error_message`."""

    def __init__(self, cause: str, detail: str = "") -> None:
        if cause not in CAUSES:
            raise ValueError(f"cause {cause!r} is not one of {', '.join(CAUSES)}")
        words = " ".join(detail.split())
        said = words.encode("ascii", "backslashreplace").decode()[:_MAX_DETAIL_CHARS]
        super().__init__(f"{cause}: {said}" if said else cause)
        self.cause = cause

    @property
    def transient(self) -> bool:
        """Whether a later try may succeed."""
        return self.cause in TRANSIENT


def cause_of(message: str | None) -> str:
    """The cause in an `error_message`; "bad_answer" for words that are not ours."""
    cause = (message or "").split(":", 1)[0]
    return cause if cause in CAUSES else "bad_answer"
