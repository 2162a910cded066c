"""A local web server of images and of every kind of failing response."""

from __future__ import annotations

import contextlib
import datetime
import gzip
import io
import socket
import ssl
import struct
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from PIL import Image

Reply = Callable[["Visit"], None]


def image(number: int = 0, *, side: int = 48, kind: str = "JPEG") -> bytes:
    """A small image; another for each number."""
    gradient = Image.linear_gradient("L").resize((side, side * 3 // 2))
    bands = [gradient.point(lambda v, k=k: (v + number * k * 7) % 256) for k in (1, 2, 3)]
    buffer = io.BytesIO()
    Image.merge("RGB", bands).save(buffer, kind)
    return buffer.getvalue()


def photograph(side: int) -> bytes:
    """A JPEG with as many bytes as a photograph: shorter side `side`, longer side half as long again."""
    noise = Image.effect_noise((side * 3 // 16, side // 8), 60).resize((side * 3 // 2, side))
    buffer = io.BytesIO()
    Image.merge("RGB", [noise, noise.rotate(180), noise.transpose(Image.Transpose.FLIP_TOP_BOTTOM)]).save(
        buffer, "JPEG", quality=85
    )
    return buffer.getvalue()


def png_of_size(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header announces this size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(b"\0" * 100)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


class Visit(BaseHTTPRequestHandler):
    """One request."""

    web: Web

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.web.requests[self.path] += 1
        self.web.headers = dict(self.headers)
        reply = self.web.replies.get(path)
        with contextlib.suppress(OSError):
            if reply is None:
                self.say(404)
            else:
                reply(self)
        self.close_connection = True

    def say(self, status: int = 200, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        defaults = {"Content_Length": str(len(body))}
        for name, value in (defaults | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def raw(self, data: bytes) -> None:
        self.wfile.write(data)
        self.wfile.flush()

    def drip(self, data: bytes, *, seconds: float) -> None:
        for byte in data:
            self.raw(bytes([byte]))
            time.sleep(seconds)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


@dataclass
class Web:
    """The server: its replies by path, and the number of requests by path."""

    port: int = 0
    replies: dict[str, Reply] = field(default_factory=dict)
    requests: Counter[str] = field(default_factory=Counter)
    headers: dict[str, str] = field(default_factory=dict)

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def serve(self, path: str, body: bytes, status: int = 200, **headers: str) -> str:
        """Reply to `path` with this body; returns the URL."""
        self.replies[path] = lambda visit: visit.say(status, body, **headers)
        return self.url(path)

    def answer(self, path: str, reply: Reply) -> str:
        self.replies[path] = reply
        return self.url(path)

    def redirect(self, path: str, to: str, status: int = 302) -> str:
        return self.answer(path, lambda visit: visit.say(status, Location=to))

    def fails_first(self, path: str, body: bytes, *, times: int = 1, status: int = 500) -> str:
        """Fail `times` times, then reply with this body."""

        def reply(visit: Visit) -> None:
            if self.requests[path] <= times:
                visit.say(status)
            else:
                visit.say(200, body)

        return self.answer(path, reply)


@contextmanager
def local_web(certificate: Path | None = None) -> Iterator[Web]:
    """The server; with a certificate (a PEM file with its key) it speaks TLS."""
    web = Web()
    visit = type("BoundVisit", (Visit,), {"web": web})
    server = _Server(("127.0.0.1", 0), visit)
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    web.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield web
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def reset(visit: Visit) -> None:
    """Reset the connection in the middle of the body."""
    visit.raw(b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\nabc")
    visit.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    visit.connection.close()


def write_certificate(folder: Path, *, name: str) -> Path:
    """A self-signed certificate for `name` and its key, in one PEM file."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    file = folder / f"{name}.pem"
    form = (serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    encoding = serialization.Encoding.PEM
    file.write_bytes(certificate.public_bytes(encoding) + key.private_bytes(encoding, *form))
    return file


def gzip_bomb() -> bytes:
    return gzip.compress(b"\0" * (10 << 20))
