"""Causes of failed fetches: a closed list, divided by whether a retry may succeed."""

from typing import Final

TRANSIENT: Final = {
    "timed_out": "the response was not complete in time",
    "connection_failed": "no connection to the server, or it broke before the response",
    "cut_short": "the connection ended before the body did",
    "name_server_failed": "the name server did not answer",
    "too_many_requests": "the server answered 429",
    "server_error": "the server answered 5xx",
    "interrupted": "img2dataset failed or stalled before this row was done",
}
"""Causes that a retry may find gone, and their meaning."""

PERMANENT: Final = {
    "gone": "the server answered 404 or 410",
    "refused": "the server answered with another status than 200",
    "opted_out": "a response header opts the image out of this use",
    "private_address": "the name or address is not on the open internet",
    "no_such_host": "the name does not exist",
    "bad_url": "the URL cannot be fetched",
    "bad_redirect": "a redirect leads nowhere, in a circle or too far",
    "bad_answer": "the response is not valid HTTP",
    "bad_certificate": "the server's certificate could not be verified",
    "too_large": "the response has more bytes than the settings allow",
    "empty": "the response has no body",
    "not_an_image": "the body is in no accepted format",
    "too_many_pixels": "the image's header announces more pixels than the settings allow",
    "broken_image": "the image data is truncated or corrupt",
    "crashed": "the image crashed or stalled the process that decoded it",
}
"""Causes that a retry cannot change, and their meaning."""

CAUSES: Final = {**TRANSIENT, **PERMANENT}
"""Every cause. Sidecars and receipts store these keys, so they are never renamed."""

_MAX_DETAIL_CHARS: Final = 120


class FetchError(Exception):
    """The cause of a failed fetch; its text is what img2dataset records as `error_message`."""

    def __init__(self, cause: str, detail: str = "") -> None:
        if cause not in CAUSES:
            raise ValueError(f"cause {cause!r} is not one of {', '.join(CAUSES)}")
        line = " ".join(detail.split()).encode("ascii", "backslashreplace").decode()[:_MAX_DETAIL_CHARS]
        super().__init__(f"{cause}: {line}" if line else cause)
        self.cause = cause

    @property
    def is_transient(self) -> bool:
        """Whether a retry may succeed."""
        return self.cause in TRANSIENT


def cause_of(message: str | None) -> str:
    """The cause in an `error_message`; "bad_answer" for img2dataset's own messages."""
    cause = (message or "").split(":", 1)[0]
    return cause if cause in CAUSES else "bad_answer"
