"""A proxy before an S3 server that injects faults of networks and stores, by a seeded schedule.

`python tests/fault_proxy.py UPSTREAM_PORT LOG SEED RATE MOST` prints its port; each fault is a line of LOG:

- 503         the store responds with SlowDown, and does nothing
- reset       the connection breaks before the request arrives
- lost        the store carries out the request, and the connection breaks before the response
- stall       nothing comes for a while, then the connection breaks
- truncation  half of the response or of the request body arrives, and the connection breaks

Every operation (data PUT, log PUT, GET, LIST) gets every fault in turn. At most two requests in a row for the
same object are hit, so that retries can succeed.
"""

import contextlib
import http.client
import itertools
import json
import random
import socket
import struct
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

KINDS = ("503", "reset", "lost", "stall", "truncation")
OPERATIONS = ("data PUT", "log PUT", "GET", "LIST")
STALL_SECONDS = 0.5
_SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
_ONE_HOP = {"connection", "keep-alive", "transfer-encoding", "proxy-connection", "te"}


def operation_of(method: str, path: str) -> str | None:
    """The operation of a request; None for others, such as HEAD and DELETE."""
    path, _, query = path.partition("?")
    if method == "PUT":
        return "log PUT" if "/_delta_log/" in path else "data PUT"
    if method == "GET":
        return "LIST" if "list-type=2" in query or "prefix=" in query else "GET"
    return None


class FaultSchedule:
    """Hits a fraction `rate` of the requests, until there were `most` of each operation."""

    def __init__(self, *, seed: int, rate: float, most: int, log: Path) -> None:
        self._random = random.Random(seed)
        self._rate, self._log = rate, log
        self._left = dict.fromkeys(OPERATIONS, most)
        self._next = {operation: itertools.cycle(KINDS) for operation in OPERATIONS}
        self._in_a_row: Counter[str] = Counter()
        self._lock = threading.Lock()

    def fault(self, method: str, path: str) -> str | None:
        """The fault of this request, or None."""
        operation = operation_of(method, path)
        if operation is None:
            return None
        with self._lock:
            name = path.partition("?")[0]
            hit = (
                self._random.random() < self._rate and self._left[operation] > 0 and self._in_a_row[name] < 2
            )
            if not hit:
                self._in_a_row[name] = 0
                return None
            self._in_a_row[name] += 1
            self._left[operation] -= 1
            kind = next(self._next[operation])
            with self._log.open("a") as file:
                file.write(json.dumps([operation, kind]) + "\n")
            return kind


class Handler(BaseHTTPRequestHandler):
    """One connection of a client."""

    protocol_version = "HTTP/1.1"
    schedule: FaultSchedule
    upstream: int

    def do_GET(self) -> None:
        self._handle()

    do_PUT = do_POST = do_DELETE = do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Log nothing."""

    def _handle(self) -> None:
        fault = self.schedule.fault(self.command, self.path)
        if fault == "truncation" and self.command == "PUT":
            self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
            return self._reset()
        if fault == "reset":
            return self._reset()
        body = self._body()
        if fault == "503":
            return self._respond(503, [("Content-Type", "application/xml")], _SLOW_DOWN)
        if fault == "stall":
            time.sleep(STALL_SECONDS)
            return self._reset()
        status, headers, content = self._forward(body)
        if fault == "lost":
            return self._reset()
        return self._respond(status, headers, content, cut=fault == "truncation")

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        pieces = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(pieces)

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        server = http.client.HTTPConnection("127.0.0.1", self.upstream, timeout=60)
        with contextlib.closing(server):
            kept = {name: value for name, value in self.headers.items() if name.lower() not in _ONE_HOP}
            server.request(self.command, self.path, body=body, headers=kept)
            answer = server.getresponse()
            headers = [(name, value) for name, value in answer.getheaders() if name.lower() not in _ONE_HOP]
            return answer.status, headers, answer.read()

    def _respond(
        self, status: int, headers: list[tuple[str, str]], content: bytes, *, cut: bool = False
    ) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        if "content-length" not in {name.lower() for name, _ in headers}:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self.wfile.flush()
            self._reset()

    def _reset(self) -> None:
        """Close the connection with RST, as a middlebox does."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def finish(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            super().finish()


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *_: object) -> None:
        """Ignore clients that went away."""


def main() -> None:
    upstream, log, seed, rate, most = sys.argv[1:]
    Handler.upstream = int(upstream)
    Handler.schedule = FaultSchedule(seed=int(seed), rate=float(rate), most=int(most), log=Path(log))
    server = Server(("127.0.0.1", 0), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
