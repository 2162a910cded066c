"""Serves files over HTTP on this machine only, with the headers that threads of WebAssembly need."""

import sys
from collections.abc import Mapping
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

HOST = "127.0.0.1"

_HEADERS = {
    # Shared memory is for pages that no other origin shares a process with.
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'self' 'wasm-unsafe-eval' data: blob:",
    "X-Content-Type-Options": "nosniff",
    # A browser asks each time, and is told when a file has not changed.
    "Cache-Control": "no-cache",
}
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".md": "text/plain; charset=utf-8",
    ".sha256": "text/plain; charset=utf-8",
    ".wasm": "application/wasm",
    ".png": "image/png",
    "": "application/octet-stream",
}
_SECONDS_OF_SILENCE = 60.0


class Site(ThreadingHTTPServer):
    """An HTTP server of some files, and of nothing else.

    Args:
        files: by their names in a URL, without the first slash.
        front: path that `/` leads to.
        port: to listen at; 0 for any that is free.

    Raises:
        OSError: if the port is in use.
    """

    daemon_threads = True
    # Two servers at one port would take turns.
    allow_reuse_port = False

    def __init__(self, files: Mapping[str, Path], *, front: str, port: int) -> None:
        self.files, self.front = dict(files), front
        super().__init__((HOST, port), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ANN401 - the base class's
        """Report an error, but for a browser that goes away before it has all of a file."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://{HOST}:{self.server_address[1]}/"


class _Handler(SimpleHTTPRequestHandler):
    """Answers GET and HEAD, and If-Modified-Since."""

    server: Site
    protocol_version = "HTTP/1.1"
    timeout = _SECONDS_OF_SILENCE
    extensions_map = _TYPES

    def do_GET(self) -> None:
        """Send a file, or lead from `/` to the front page."""
        if urlsplit(self.path).path != "/":
            super().do_GET()
            return
        self.send_response(HTTPStatus.FOUND)
        self.send_header("Location", urlsplit(self.path)._replace(path=f"/{self.server.front}").geturl())
        self.send_header("Content-Length", "0")
        self.end_headers()

    def translate_path(self, path: str) -> str:
        """The file of a URL's path; an impossible one if there is none."""
        name = unquote(urlsplit(path).path).removeprefix("/")
        if name.endswith("/"):
            name += "index.html"
        return str(self.server.files.get(name, Path("/nonexistent")))

    def end_headers(self) -> None:
        """Add what every answer has."""
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, *_: object) -> None:
        """Log nothing: a page asks for dozens of files."""
