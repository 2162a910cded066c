"""Keeps pages of other hosts away from an application, and its own pages away from other hosts."""

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_NAMES = ("127.0.0.1", "localhost")
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class OwnMachine:
    """ASGI middleware that answers only if the address names this machine, and adds headers to each answer.

    A host of another name that leads here would let that host's pages read what is answered.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        host = Headers(scope=scope).get("host", "")
        app = self._app
        if host.rpartition(":")[0] not in _NAMES and host not in _NAMES:
            names = " or ".join(_NAMES)
            app = JSONResponse({"error": f"host {host!r}: {names} is accepted"}, 400)
        await app(scope, receive, send_with_headers)
