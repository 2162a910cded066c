"""Guards img2dataset's only way to the network: one GET per image, bounded in time, bytes and addresses.

`urllib.request.urlopen` calls the opener that `urllib.request.install_opener` was given, here a
`GuardedOpener`. It speaks only http and https, and uses no proxy. Each request resolves its name once and
connects to the very address that was checked, on every redirect too, so that a name server that changes its
answer in between (DNS rebinding) has no effect. Whatever a server does, an attempt ends within its seconds
and bytes.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import ipaddress
import socket
import ssl
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import Message
from functools import partial
from typing import Any, Final

from pipelines.fetching.addresses import may_connect, parse_networks
from pipelines.fetching.causes import FetchError
from pipelines.fetching.image_headers import check_image
from pipelines.fetching.optout import find_opt_out
from pipelines.fetching.sockets import BUFFER_BYTES, BoundedSocket, call_until, seconds_left
from pipelines.fetching.urls import RequestTarget, follow_redirect, parse_url

_REDIRECTS: Final = (301, 302, 303, 307, 308)
# Status line, headers and chunk framing, in addition to the body.
_FRAMING_BYTES: Final = 1 << 18
_CAUSES_BY_STATUS: Final = {404: "gone", 410: "gone", 429: "too_many_requests"}

Resolver = Callable[..., list[tuple[Any, ...]]]
"""`socket.getaddrinfo`, or a substitute."""


@dataclass(frozen=True, kw_only=True)
class RequestRules:
    """Headers of image requests, and bounds on each.

    Attributes:
        max_bytes: of a body.
        max_pixels: that a header may announce.
        max_redirects: that are followed.
        seconds: of one attempt, from the look-up to the last byte.
        tries: attempts; only transient causes are retried.
        pause: seconds before the second attempt, doubled before each further one.
        decode_seconds: for decoding, resizing and encoding.
        agent: the user agent's name, which opt-outs may address.
        directives: the opt-outs that are respected.
        private_networks: networks that may be reached although they are not on the open internet.
    """

    max_bytes: int
    max_pixels: int
    max_redirects: int
    seconds: float
    tries: int
    pause: float
    decode_seconds: float
    agent: str
    directives: Sequence[str]
    private_networks: Sequence[str] = ()


@dataclass(frozen=True)
class GuardedOpener:
    """An opener for `urllib.request`: returns complete images or raises `FetchError`.

    Attributes:
        rules: of each request.
        on_response: called after each request, successful or not.
        resolver: resolves names to addresses.
        tls: of https connections.
    """

    rules: RequestRules
    on_response: Callable[[], None] = lambda: None
    resolver: Resolver = socket.getaddrinfo
    tls: ssl.SSLContext = field(default_factory=ssl.create_default_context)

    def open(self, request: urllib.request.Request, data: object = None, timeout: object = None) -> Response:
        """Fetch an image.

        Args:
            request: only its URL and its `User-agent` are used.
            data: ignored; nothing is ever sent.
            timeout: ignored; it would bound each wait, but `RequestRules.seconds` bounds their sum.

        Raises:
            FetchError: if it cannot be fetched.
        """
        del data, timeout
        agent = request.get_header("User-agent") or self.rules.agent
        pause = self.rules.pause
        try:
            for _ in range(self.rules.tries - 1):
                try:
                    return self._attempt(request.full_url, agent)
                except FetchError as error:
                    if not error.is_transient:
                        raise
                time.sleep(pause)
                pause *= 2
            return self._attempt(request.full_url, agent)
        finally:
            self.on_response()

    def _attempt(self, url: str, agent: str) -> Response:
        deadline = time.monotonic() + self.rules.seconds
        seen: set[str] = set()
        while len(seen) <= self.rules.max_redirects:
            if url in seen:
                raise FetchError("bad_redirect", "in a circle")
            seen.add(url)
            target = parse_url(url)
            with _as_fetch_errors():
                response = self._request(target, agent, deadline)
            if isinstance(response, Response):
                check_image(response.getvalue(), max_pixels=self.rules.max_pixels)
                return response
            url = follow_redirect(url, response)
        raise FetchError("bad_redirect", f"more than {self.rules.max_redirects}")

    def _request(self, target: RequestTarget, agent: str, deadline: float) -> Response | str:
        """The complete response, or the location of a redirect."""
        budget = self.rules.max_bytes + _FRAMING_BYTES
        connected = BoundedSocket(self._connect(target, deadline), deadline=deadline, budget=budget)
        connection = http.client.HTTPConnection(target.host)
        connection.sock = connected
        try:
            headers = {"Host": target.authority, "User-Agent": agent, "Accept": "*/*"}
            connection.request("GET", target.path, headers=headers)
            with contextlib.closing(connection.getresponse()) as response:
                return self._read(response)
        finally:
            connected.disconnect()

    def _read(self, response: http.client.HTTPResponse) -> Response | str:
        directives = frozenset(directive.lower() for directive in self.rules.directives)
        opt_out = find_opt_out(response.headers, agent=self.rules.agent.lower(), directives=directives)
        if opt_out:
            raise FetchError("opted_out", opt_out)
        if response.status in _REDIRECTS:
            return response.headers.get("Location") or ""
        if response.status != http.client.OK:
            default = "server_error" if 500 <= response.status < 600 else "refused"
            raise FetchError(_CAUSES_BY_STATUS.get(response.status, default), f"HTTP {response.status}")
        coding = (response.headers.get("Content-Encoding") or "identity").strip().lower()
        if coding != "identity":
            # The request accepts none, and a small compressed body may unpack to any size.
            raise FetchError("bad_answer", f"content encoding {coding}")
        return Response(self._body(response), headers=response.headers)

    def _body(self, response: http.client.HTTPResponse) -> bytes:
        max_bytes, announced = self.rules.max_bytes, response.length
        if announced is not None:
            if announced > max_bytes:
                raise FetchError("too_large", f"{announced} bytes announced, {max_bytes} are allowed")
            body = response.read(announced)
            if len(body) < announced:
                raise FetchError("cut_short", f"{len(body)} of {announced} bytes")
            return body
        pieces, size = [], 0
        while piece := response.read(BUFFER_BYTES):
            size += len(piece)
            if size > max_bytes:
                raise FetchError("too_large", f"more than the {max_bytes} bytes that are allowed")
            pieces.append(piece)
        return b"".join(pieces)

    def _connect(self, target: RequestTarget, deadline: float) -> socket.socket:
        addresses = self._resolve(target, deadline)
        last_error: OSError = TimeoutError()
        for index, (family, kind, protocol, address) in enumerate(addresses):
            # The time is divided, so that an address that never answers leaves some for the others.
            seconds = seconds_left(deadline) / (len(addresses) - index)
            connected = socket.socket(family, kind, protocol)
            try:
                connected.settimeout(seconds)
                connected.connect(address)
                if target.scheme == "https":
                    connected.settimeout(seconds_left(deadline))
                    return self.tls.wrap_socket(connected, server_hostname=target.host)
            except OSError as error:
                connected.close()
                if isinstance(error, ssl.SSLError):
                    raise
                last_error = error
            else:
                return connected
        raise last_error

    def _resolve(self, target: RequestTarget, deadline: float) -> list[tuple[int, int, int, Any]]:
        """The checked addresses of the target's name.

        One private address among several refuses the name: such a mixture is no accident.
        """
        look_up = partial(self.resolver, target.host, target.port, type=socket.SOCK_STREAM)
        try:
            found = call_until(deadline, look_up)
        except socket.gaierror as error:
            is_transient = error.errno in (socket.EAI_AGAIN, socket.EAI_SYSTEM, socket.EAI_MEMORY)
            cause = "name_server_failed" if is_transient else "no_such_host"
            raise FetchError(cause, error.strerror or "") from None
        except UnicodeError as error:
            raise FetchError("bad_url", str(error)) from None
        allowed = parse_networks(self.rules.private_networks)
        for *_, address in found:
            ip = ipaddress.ip_address(address[0].partition("%")[0])
            if not may_connect(ip, allowed=allowed):
                raise FetchError("private_address", str(ip))
        return [(family, kind, protocol, address) for family, kind, protocol, _, address in found]


class Response(io.BytesIO):
    """The body of a complete response, with its `headers`: what img2dataset uses of one."""

    def __init__(self, body: bytes, *, headers: Message) -> None:
        super().__init__(body)
        self.headers = headers


@contextmanager
def _as_fetch_errors() -> Iterator[None]:
    """Translate the exceptions of `socket`, `ssl` and `http.client`."""
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
        # RemoteDisconnected, of a server that closes before its status line, is one of these too.
        raise FetchError("connection_failed", error.strerror or type(error).__name__) from None
    except (http.client.HTTPException, ValueError) as error:
        raise FetchError("bad_answer", type(error).__name__) from None
