"""Headers by which a site asks that its pictures be not indexed, or not used to train."""

from __future__ import annotations

import re
from email.message import Message
from typing import Final

# `X-Robots-Tag: otherbot: noindex` is for a robot of that name; these have values and are no robots.
_WITH_VALUE: Final = {"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"}
_FOR_ONE: Final = re.compile(r"\s*([\w.*-]+)\s*:(.*)", re.DOTALL)
_IMPLIED: Final = {"none": ("noindex", "nofollow")}

RESERVATION: Final = "tdm-reservation"
"""The directive that stands for the header `TDM-Reservation: 1`, of the protocol of that name."""


def find_opt_out(headers: Message, *, agent: str, directives: frozenset[str]) -> str:
    """The first of `directives` that the headers hold for everybody or for `agent`; empty if there is none.

    Args:
        headers: of an answer.
        agent: our name, in lower case.
        directives: such as "noai", in lower case.
    """
    if RESERVATION in directives and (headers.get("TDM-Reservation") or "").strip() == "1":
        return RESERVATION
    for line in headers.get_all("X-Robots-Tag", []):
        for said in _said(str(line), agent):
            if said in directives:
                return said
    return ""


def _said(line: str, agent: str) -> list[str]:
    """The directives of one header that are for `agent`."""
    said: list[str] = []
    meant = True
    for part in line.lower().split(","):
        named = _FOR_ONE.fullmatch(part)
        if named and named[1] not in _WITH_VALUE:
            # A name holds until the next: `otherbot: noindex, noai` asks nothing of us.
            meant = named[1] in (agent, "*")
            part = named[2]  # noqa: PLW2901 - what is left of it
        word = part.strip()
        if meant:
            said += [word, *_IMPLIED.get(word, ())]
    return said
