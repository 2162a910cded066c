"""The only way in which img2dataset reaches the network: one guarded GET for each picture.

`urllib.request.urlopen` calls what `urllib.request.install_opener` was given, here a `GuardedOpener`. It speaks http
and https alone, to no proxy. A name is looked up once for each request, and the connection goes to the very
address that was judged, on every redirection too: a name that changes its mind between the two finds nobody
asking again. Whatever a server does, a try ends within its seconds and its bytes.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import ipaddress
import re
import socket
import ssl
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from email.message import Message
from types import TracebackType
from typing import Any, Final, Self
from urllib.parse import quote, urljoin, urlsplit

from pipelines.fetching.addresses import may_connect, parse_networks
from pipelines.fetching.causes import FetchError
from pipelines.fetching.optout import find_opt_out
from pipelines.fetching.pictures import check_image

MAX_URL_CHARS: Final = 8192
_HOST: Final = re.compile(r"[A-Za-z0-9._-]{1,253}")
# What stands for itself in a path or query; "%" because what is escaped already stays as it is.
_UNESCAPED: Final = "%/:?#[]@!$&'()*+,;=~|"
_PORTS: Final = {"http": 80, "https": 443}
_FIRST_FREE_PORT: Final = 1024
_REDIRECTIONS: Final = (301, 302, 303, 307, 308)
# Status line, headers and the framing of chunks, beside the body.
_FRAMING_BYTES: Final = 1 << 18
_PIECE_BYTES: Final = 1 << 16

Resolver = Callable[..., list[tuple[Any, ...]]]
"""`socket.getaddrinfo`, or what stands for it."""


@dataclass(frozen=True, kw_only=True)
class RequestLimits:
    """What one picture may cost.

    Attributes:
        max_bytes: of a body.
        max_pixels: that a header may announce.
        max_redirects: how many redirections are followed.
        seconds: of one try, from the look-up to the last byte.
        tries: of one picture; only causes that may pass are tried again.
        pause: seconds before the second try; before each further one twice as long.
    """

    max_bytes: int
    max_pixels: int
    max_redirects: int
    seconds: float
    tries: int
    pause: float


class GuardedOpener:
    """Answers `urllib.request.urlopen`, with whole pictures or with `FetchError`.

    Args:
        limits: of each picture.
        agent: the name by which sites may ask us to stay away.
        directives: the requests of `X-Robots-Tag` that are respected.
        private_networks: networks that may be reached although they are not of the open internet.
        lookup: how names become addresses.
    """

    def __init__(
        self,
        *,
        limits: RequestLimits,
        agent: str,
        directives: Sequence[str],
        private_networks: Sequence[str] = (),
        lookup: Resolver = socket.getaddrinfo,
    ) -> None:
        self.limits = limits
        self._agent = agent.lower()
        self._directives = frozenset(directive.lower() for directive in directives)
        self._networks = parse_networks(private_networks)
        self._lookup = lookup
        self._tls = ssl.create_default_context()

    def open(self, request: urllib.request.Request, data: object = None, timeout: object = None) -> Response:
        """The picture that `request` names.

        Args:
            request: its URL and its `User-agent` are used.
            data: ignored; nothing is ever sent.
            timeout: ignored; it would bound each wait, where `RequestLimits.seconds` bounds them together.

        Raises:
            Unfetched: if it cannot be had.
        """
        del data, timeout
        agent = request.get_header("User-agent") or self._agent
        pause = self.limits.pause
        for _ in range(self.limits.tries - 1):
            try:
                return self._try(request.full_url, agent)
            except FetchError as fault:
                if not fault.transient:
                    raise
            time.sleep(pause)
            pause *= 2
        return self._try(request.full_url, agent)

    def _try(self, url: str, agent: str) -> Response:
        deadline = time.monotonic() + self.limits.seconds
        seen: set[str] = set()
        while len(seen) <= self.limits.max_redirects:
            if url in seen:
                raise FetchError("bad_redirect", "in a circle")
            seen.add(url)
            target = parse_url(url)
            with _causes():
                answer = self._ask(target, agent, deadline)
            if isinstance(answer, Response):
                check_image(answer.body, max_pixels=self.limits.max_pixels)
                return answer
            url = _follow(url, answer)
        raise FetchError("bad_redirect", f"more than {self.limits.max_redirects}")

    def _ask(self, target: RequestTarget, agent: str, deadline: float) -> Response | str:
        """The whole answer, or where it redirects to."""
        line = _BoundedSocket(
            self._connect(target, deadline), deadline=deadline, budget=self.limits.max_bytes + _FRAMING_BYTES
        )
        connection = http.client.HTTPConnection(target.host)
        connection.sock = line
        try:
            connection.request(
                "GET", target.path, headers={"Host": target.authority, "User-Agent": agent, "Accept": "*/*"}
            )
            with contextlib.closing(connection.getresponse()) as response:
                return self._read(response)
        finally:
            line.hang_up()

    def _read(self, response: http.client.HTTPResponse) -> Response | str:
        refused = find_opt_out(response.headers, agent=self._agent, directives=self._directives)
        if refused:
            raise FetchError("opted_out", refused)
        if response.status in _REDIRECTIONS:
            return response.headers.get("Location") or ""
        if response.status != http.client.OK:
            raise _refusal(response.status)
        coding = (response.headers.get("Content-Encoding") or "identity").strip().lower()
        if coding != "identity":
            # None was asked for, and what unpacks to any size is not unpacked.
            raise FetchError("bad_answer", f"content encoding {coding}")
        return Response(headers=response.headers, body=self._body(response))

    def _body(self, response: http.client.HTTPResponse) -> bytes:
        most, promised = self.limits.max_bytes, response.length
        if promised is not None and promised > most:
            raise FetchError("too_large", f"{promised} bytes announced, {most} are allowed")
        if promised is not None:
            body = response.read(promised)
            if len(body) < promised:
                raise FetchError("cut_short", f"{len(body)} of {promised} bytes")
            return body
        pieces, size = [], 0
        while piece := response.read(_PIECE_BYTES):
            size += len(piece)
            if size > most:
                raise FetchError("too_large", f"more than the {most} bytes that are allowed")
            pieces.append(piece)
        return b"".join(pieces)

    def _connect(self, target: RequestTarget, deadline: float) -> socket.socket:
        addresses = self._addresses(target)
        fault: OSError = TimeoutError()
        for tried, (family, kind, protocol, place) in enumerate(addresses):
            # One address that swallows everything leaves time for the others.
            seconds = _left(deadline) / (len(addresses) - tried)
            line = socket.socket(family, kind, protocol)
            try:
                line.settimeout(seconds)
                line.connect(place)
                if target.scheme == "https":
                    line.settimeout(_left(deadline))
                    return self._tls.wrap_socket(line, server_hostname=target.host)
            except ssl.SSLError:
                line.close()
                raise
            except OSError as error:
                line.close()
                fault = error
            else:
                return line
        raise fault

    def _addresses(self, target: RequestTarget) -> list[tuple[int, int, int, Any]]:
        """Where the target's name leads, each place judged.

        A name of which only one address is private is refused whole: it is no mistake.
        """
        try:
            found = self._lookup(target.host, target.port, type=socket.SOCK_STREAM)
        except socket.gaierror as error:
            again = error.errno in (socket.EAI_AGAIN, socket.EAI_SYSTEM, socket.EAI_MEMORY)
            cause = "name_server_failed" if again else "no_such_host"
            raise FetchError(cause, error.strerror or "") from None
        except UnicodeError as error:
            raise FetchError("bad_url", str(error)) from None
        for *_, place in found:
            address = ipaddress.ip_address(place[0].partition("%")[0])
            if not may_connect(address, allowed=self._networks):
                raise FetchError("private_address", str(address))
        return [(family, kind, protocol, place) for family, kind, protocol, _, place in found]


class Response:
    """A whole answer, as far as img2dataset looks at it: headers, and a body to be read once.

    Attributes:
        headers: of the last answer.
        body: the picture.
    """

    def __init__(self, *, headers: Message, body: bytes) -> None:
        self.headers = headers
        self.body = body

    def read(self) -> bytes:
        """The body."""
        return self.body

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


@dataclass(frozen=True, kw_only=True)
class RequestTarget:
    """A URL as it is asked for: `host` for the look-up, `authority` for the server, `path` with the query."""

    scheme: str
    host: str
    port: int
    authority: str
    path: str


def parse_url(url: str) -> RequestTarget:
    """A URL's parts, escaped as browsers do it: lists hold spaces and letters of every script.

    Raises:
        Unfetched: `bad_url`.
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
    usual = _PORTS[parts.scheme]
    if port is not None and port != usual and port not in _PORTS.values() and port < _FIRST_FREE_PORT:
        # Other programs listen there, and some take a GET for a command.
        raise FetchError("bad_url", f"port {port}")
    named = f"[{host}]" if ":" in host else host
    return RequestTarget(
        scheme=parts.scheme,
        host=host,
        port=port or usual,
        authority=named if port in (None, usual) else f"{named}:{port}",
        path=f"{path if path.startswith('/') else f'/{path}'}{'?' if query else ''}{query}",
    )


def _host(name: str) -> str:
    """The name as the look-up takes it; an IPv6 address without its brackets.

    Raises:
        ValueError: if it is no name.
    """
    if ":" in name and "%" not in name:  # which would name an interface of this machine
        return str(ipaddress.IPv6Address(name))
    host = name if name.isascii() else name.encode("idna").decode()
    if not _HOST.fullmatch(host):
        raise ValueError(f"host {name!r}")
    return host


def _follow(url: str, location: str) -> str:
    if not location:
        raise FetchError("bad_redirect", "to nowhere")
    try:
        # Headers are read as Latin-1; what servers write there is UTF-8.
        following = urljoin(url, location.encode("latin-1").decode())
        scheme = urlsplit(following).scheme
    except ValueError as error:
        raise FetchError("bad_redirect", str(error)) from None
    if scheme not in _PORTS:
        raise FetchError("bad_redirect", f"scheme {scheme!r}")
    return following.partition("#")[0]


def _refusal(status: int) -> FetchError:
    if status == http.client.TOO_MANY_REQUESTS:
        return FetchError("too_many_requests", "HTTP 429")
    if status in (http.client.NOT_FOUND, http.client.GONE):
        return FetchError("gone", f"HTTP {status}")
    return FetchError("server_error" if 500 <= status < 600 else "refused", f"HTTP {status}")


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


class _BoundedSocket:
    """A connected socket with a deadline and a budget, as far as `http.client` uses sockets."""

    def __init__(self, line: socket.socket, *, deadline: float, budget: int) -> None:
        self._line = line
        self._deadline = deadline
        self._budget = budget

    def sendall(self, data: bytes) -> None:
        self._line.settimeout(_left(self._deadline))
        self._line.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        del mode
        return io.BufferedReader(_Received(self), _PIECE_BYTES)

    def receive(self, buffer: bytearray | memoryview) -> int:
        self._line.settimeout(_left(self._deadline))
        count = self._line.recv_into(buffer)
        self._budget -= count
        if self._budget < 0:
            raise FetchError("too_large", "with its headers")
        return count

    def close(self) -> None:
        """Nothing yet: `http.client` closes as soon as an answer has begun, and its body is still to come."""

    def hang_up(self) -> None:
        self._line.close()


class _Received(io.RawIOBase):
    """What comes over a line, as a file."""

    def __init__(self, line: _BoundedSocket) -> None:
        self._over = line

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:  # noqa: ANN401 - any buffer
        return self._over.receive(buffer)


@contextmanager
def _causes() -> Iterator[None]:
    """What the libraries raise, as a cause."""
    try:
        yield
    except FetchError:
        raise
    except TimeoutError:
        raise FetchError("timed_out") from None
    except ssl.SSLCertVerificationError as error:
        raise FetchError("bad_certificate", error.verify_message) from None
    except http.client.IncompleteRead:
        raise FetchError("cut_short") from None
    except OSError as error:
        # A server that closes before its status line is one of these too.
        raise FetchError("connection_failed", error.strerror or type(error).__name__) from None
    except (http.client.HTTPException, ValueError) as error:
        raise FetchError("bad_answer", type(error).__name__) from None
