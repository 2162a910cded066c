"""A hub of models on this machine: a folder of repositories, by the interface that huggingface_hub speaks."""

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0" * 40


@contextlib.contextmanager
def hub_server(root: Path, *, refusal: int | None = None) -> Iterator[tuple[str, list[str]]]:
    """Serve the repositories `root`/OWNER/NAME; yields the address and the files that are fetched.

    Commits are taken from whoever has a token, or all answered with the status `refusal`.
    """
    fetched: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def do_POST(self) -> None:
            _take_commit(self, root, refusal=refusal)

        def log_message(self, *_: object) -> None:
            pass

        def _answer(self, *, with_body: bool) -> None:
            parts = self.path.split("?")[0].strip("/").split("/")
            found, name = _find(root, parts)
            if with_body and found is not None and name:
                fetched.append(name)
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


def _find(root: Path, parts: list[str]) -> tuple[bytes | None, str]:
    """What is at a path, and the name of the file that it is, if it is one."""
    if parts[:2] == ["api", "models"]:
        return _describe(root / parts[2] / parts[3], tree="tree" in parts[4:5]), ""
    name = "/".join(parts[4:])
    path = root / parts[0] / parts[1] / name
    return path.read_bytes() if path.is_file() else None, name


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


def _take_commit(request: BaseHTTPRequestHandler, root: Path, *, refusal: int | None) -> None:
    body = request.rfile.read(int(request.headers["Content-Length"]))
    status = refusal or (200 if request.headers.get("Authorization") == "Bearer hf_test" else 401)
    address = f"http://{request.headers['Host']}"
    answer = _commit(root, request.path.strip("/").split("/"), body, address) if status == 200 else {}
    content = json.dumps(answer).encode()
    request.send_response(status)
    request.send_header("Content-Type", "application/json")
    request.send_header("Content-Length", str(len(content)))
    request.end_headers()
    request.wfile.write(content)


def _commit(root: Path, parts: list[str], body: bytes, address: str) -> dict[str, object]:
    """Answer a step of a commit as a hub does that takes every file as part of it."""
    if parts == ["api", "repos", "create"]:
        made = json.loads(body)
        return {"url": f"{address}/{made['organization']}/{made['name']}"}
    if parts[-2:-1] == ["preupload"]:
        paths = [file["path"] for file in json.loads(body)["files"]]
        return {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]}
    if parts[-2:-1] == ["commit"]:
        _, *additions = [json.loads(line) for line in body.splitlines()]
        for addition in additions:
            path = root / parts[2] / parts[3] / addition["value"]["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(base64.b64decode(addition["value"]["content"]))
        return {"commitUrl": f"{address}/{'/'.join(parts[2:4])}/commit/{COMMIT}", "commitOid": COMMIT}
    return {}
