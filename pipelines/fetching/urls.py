"""Parses URLs into request targets, and resolves redirects."""

import ipaddress
import re
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote, urljoin, urlsplit

from pipelines.fetching.causes import FetchError

MAX_URL_CHARS: Final = 8192
_HOST: Final = re.compile(r"[A-Za-z0-9._-]{1,253}")
# Characters that stay in a path or query; "%" because an existing escape must not be escaped again.
_UNESCAPED: Final = "%/:?#[]@!$&'()*+,;=~|"
_PORTS: Final = {"http": 80, "https": 443}
_FIRST_UNPRIVILEGED_PORT: Final = 1024


@dataclass(frozen=True, kw_only=True)
class RequestTarget:
    """A parsed URL: `host` for the look-up, `authority` for the Host header, `path` with the query."""

    scheme: str
    host: str
    port: int
    authority: str
    path: str


def parse_url(url: str) -> RequestTarget:
    """Parse a URL, escaping it as browsers do: URL lists contain spaces and letters of every script.

    Raises:
        FetchError: `bad_url`.
    """
    if len(url) > MAX_URL_CHARS:
        raise FetchError("bad_url", f"{len(url)} characters, {MAX_URL_CHARS} are allowed")
    if any(character < " " or character == "\x7f" for character in url):
        raise FetchError("bad_url", "control characters")
    try:
        parts = urlsplit(url.strip())
        host, port = _host(parts.hostname or ""), parts.port
        path = quote(parts.path or "/", safe=_UNESCAPED)
        query = quote(parts.query, safe=_UNESCAPED)
    except ValueError as error:
        raise FetchError("bad_url", str(error)) from None
    if parts.scheme not in _PORTS:
        raise FetchError("bad_url", f"scheme {parts.scheme!r}")
    if "@" in parts.netloc:
        raise FetchError("bad_url", "a user name")
    default = _PORTS[parts.scheme]
    if port is not None and port not in _PORTS.values() and port < _FIRST_UNPRIVILEGED_PORT:
        # Other services listen there, and some read a GET as a command.
        raise FetchError("bad_url", f"port {port}")
    bracketed = f"[{host}]" if ":" in host else host
    return RequestTarget(
        scheme=parts.scheme,
        host=host,
        port=port or default,
        authority=bracketed if port in (None, default) else f"{bracketed}:{port}",
        path=f"{path if path.startswith('/') else f'/{path}'}{'?' if query else ''}{query}",
    )


def follow_redirect(url: str, location: str) -> str:
    """The URL that a `Location` header of the response to `url` leads to.

    Raises:
        FetchError: `bad_redirect`.
    """
    if not location:
        raise FetchError("bad_redirect", "to nowhere")
    try:
        # http.client decodes headers as Latin-1; servers send UTF-8.
        following = urljoin(url, location.encode("latin-1").decode())
        scheme = urlsplit(following).scheme
    except ValueError as error:
        raise FetchError("bad_redirect", str(error)) from None
    if scheme not in _PORTS:
        raise FetchError("bad_redirect", f"scheme {scheme!r}")
    return following.partition("#")[0]


def _host(name: str) -> str:
    """The name in the form of the look-up; an IPv6 address without its brackets.

    Raises:
        ValueError: if it is no host name.
    """
    if ":" in name and "%" not in name:  # a zone id would select an interface of this machine
        return str(ipaddress.IPv6Address(name))
    host = name if name.isascii() else name.encode("idna").decode()
    if not _HOST.fullmatch(host):
        raise ValueError(f"host {name!r}")
    return host
