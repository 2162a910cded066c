"""A hub of models on this machine: a folder of repositories, by the interface that huggingface_hub speaks."""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0" * 40


@contextlib.contextmanager
def hub_server(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve the repositories `root`/OWNER/NAME; yields the address and the files that are fetched."""
    fetched: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def log_message(self, *_: object) -> None:
            pass

        def _answer(self, *, with_body: bool) -> None:
            parts = self.path.split("?")[0].strip("/").split("/")
            if parts[:2] == ["api", "models"]:
                found = _describe(root / parts[2] / parts[3], tree="tree" in parts[4:5])
            else:
                path = root / parts[0] / parts[1] / "/".join(parts[4:])
                found = path.read_bytes() if path.is_file() else None
                if with_body and found is not None:
                    fetched.append("/".join(parts[4:]))
            self._send(found, with_body=with_body)

        def _send(self, body: bytes | None, *, with_body: bool) -> None:
            self.send_response(200 if body is not None else 404)
            if body is None:
                self.send_header("X-Error-Code", "RepoNotFound")
            content = body or b""
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if with_body:
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", fetched
    finally:
        server.shutdown()
        server.server_close()


def _describe(repository: Path, *, tree: bool) -> bytes | None:
    """The hub's JSON of a repository, or of its files; None if there is none."""
    files = {
        path.relative_to(repository).as_posix(): path for path in repository.rglob("*") if path.is_file()
    }
    listed = [
        {
            "type": "file",
            "path": name,
            "size": path.stat().st_size,
            "oid": hashlib.sha256(name.encode()).hexdigest(),
        }
        for name, path in sorted(files.items())
    ]
    whole = {
        "id": repository.name,
        "sha": COMMIT,
        "siblings": [{"rfilename": name} for name in sorted(files)],
    }
    return json.dumps(listed if tree else whole).encode() if files else None
