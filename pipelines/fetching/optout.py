"""Finds response headers by which a site opts its images out of indexing or training."""

import re
from email.message import Message
from typing import Final

# `X-Robots-Tag: otherbot: noindex` addresses a robot of that name; these are directives with a value instead.
_WITH_VALUE: Final = {"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"}
_ADDRESSED: Final = re.compile(r"\s*([\w.*-]+)\s*:(.*)", re.DOTALL)
_IMPLIED: Final = {"none": ("noindex", "nofollow")}

RESERVATION: Final = "tdm-reservation"
"""The directive that stands for the header `TDM-Reservation: 1` of the TDM Reservation Protocol."""


def find_opt_out(headers: Message, *, agent: str, directives: frozenset[str]) -> str:
    """The first of `directives` that the headers set for all robots or for `agent`; empty if there is none.

    Args:
        headers: of a response.
        agent: our user agent's name, in lower case.
        directives: such as "noai", in lower case.
    """
    if RESERVATION in directives and (headers.get("TDM-Reservation") or "").strip() == "1":
        return RESERVATION
    lines = headers.get_all("X-Robots-Tag", [])
    found = (directive for line in lines for directive in _directives(str(line), agent))
    return next((directive for directive in found if directive in directives), "")


def _directives(line: str, agent: str) -> list[str]:
    """The directives of one header that apply to `agent`."""
    directives: list[str] = []
    applies = True
    for part in line.lower().split(","):
        addressed = _ADDRESSED.fullmatch(part)
        if addressed and addressed[1] not in _WITH_VALUE:
            # A name applies until the next one: `otherbot: noindex, noai` does not address us.
            applies = addressed[1] in (agent, "*")
            part = addressed[2]  # noqa: PLW2901 - the rest of it
        directive = part.strip()
        if applies:
            directives += [directive, *_IMPLIED.get(directive, ())]
    return directives
