"""Normalises the hosts of URLs, so that every spelling of a host compares equal."""

import ipaddress
import re
import socket
import unicodedata
from collections.abc import Iterator
from typing import Final
from urllib.parse import unquote, urlsplit

# Characters that a browser reads as the full stop between labels, and those that it drops from a host.
_STOPS: Final = str.maketrans(dict.fromkeys("\u3002\uff0e\uff61", "."))
_IGNORED: Final = re.compile("[\u00ad\u034f\u200b-\u200d\u2060\ufe00-\ufe0f\ufeff]")
_NUMERIC: Final = re.compile(r"[0-9a-fx.]*[0-9][0-9a-fx.]*")


def hosts_of(url: str) -> Iterator[str]:
    """The hosts that a URL may denote, each in the form of `canonical_host`.

    There are two where a backslash precedes an @: browsers end the host at the backslash, other programs at
    the next slash.
    """
    seen = set()
    for spelling in (url, url.replace("\\", "/")):
        try:
            host = urlsplit(spelling.strip()).hostname
        except ValueError:  # for example an unclosed bracket
            continue
        if host and (canonical := canonical_host(host)) and canonical not in seen:
            seen.add(canonical)
            yield canonical


def canonical_host(host: str) -> str:
    """A host in lower-case Unicode (NFKC), without a trailing full stop.

    Punycode labels and percent escapes are decoded. An IP address is in its usual notation, however it was
    written.
    """
    plain = _IGNORED.sub("", unquote(host)).translate(_STOPS)
    labels = [_label(label) for label in unicodedata.normalize("NFKC", plain).lower().split(".")]
    name = ".".join(labels).rstrip(".")
    return _address(name) if ":" in name or _NUMERIC.fullmatch(name) else name


def domain_suffixes(host: str) -> Iterator[str]:
    """A host and its parent domains: `a.b.c`, `b.c`, `c`."""
    while host:
        yield host
        host = host.partition(".")[2]


def _label(label: str) -> str:
    if not label.startswith("xn--"):
        return label
    try:
        decoded = label.removeprefix("xn--").encode("ascii").decode("punycode")
    except UnicodeError:
        return label
    return unicodedata.normalize("NFKC", decoded).lower()


def _address(name: str) -> str:
    try:
        # inet_aton also reads the octal, hexadecimal and shortened notations that hide an address.
        return str(ipaddress.IPv6Address(name)) if ":" in name else socket.inet_ntoa(socket.inet_aton(name))
    except (OSError, ValueError):
        return name
