"""`snapfusion serve`: which files it gives out, how, and which bundles and ports it refuses."""

import http.client
import json
import shutil
import socket
import struct
import subprocess
import sys
import threading
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from jobs import serve
from jobs.serving import bundle_page
from jobs.serving.bundle_page import page_files
from jobs.serving.site import Site
from snapfusion.export.bundle_files import BundleError, verify_files
from snapfusion.export.web_page import RUNTIME_FOLDER, RUNTIME_HASHES, read_hashes, write_page
from snapfusion.models.checksums import file_records

ROOT = Path(__file__).parents[3]


@pytest.fixture
def bundle(tmp_path, monkeypatch):
    """A bundle of a page alone; onnxruntime-web is nowhere."""
    monkeypatch.setattr(bundle_page, "FETCHED", tmp_path / "nothing")
    return bundle_of_page(tmp_path / "bundle")


def bundle_of_page(folder):
    folder.mkdir()
    write_page(folder)
    write_manifest(folder)
    return folder


def write_manifest(folder):
    (folder / "manifest.json").unlink(missing_ok=True)
    manifest = {"format": 2, "variants": {}, "files": file_records(folder)}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@contextmanager
def served(files):
    with Site(files, front="web/", port=0) as site:
        thread = threading.Thread(target=site.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        with closing(
            http.client.HTTPConnection("127.0.0.1", site.server_address[1], timeout=10)
        ) as connection:
            yield connection
        site.shutdown()
        thread.join()


def answer(connection, path, **headers):
    connection.request("GET", path, headers=headers)
    got = connection.getresponse()
    return got.status, got.headers, got.read()


def test_a_browser_that_goes_away_prints_nothing(tmp_path, capfd):
    large, small = tmp_path / "large", tmp_path / "small"
    large.write_bytes(bytes(1 << 25))
    small.write_bytes(b"here")
    with served({"large": large, "small": small}) as connection:
        with socket.create_connection(("127.0.0.1", connection.port)) as leaving:
            # It closes with a reset.
            leaving.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            leaving.sendall(b"GET /large HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            leaving.recv(1)
        assert answer(connection, "/small")[2] == b"here"
    assert capfd.readouterr().err == ""


def test_the_front_page_is_the_bundles(bundle):
    with served(page_files(bundle, runtime=None)) as connection:
        status, headers, _ = answer(connection, "/?seed=7")
        assert (status, headers["Location"]) == (302, "/web/?seed=7")
        status, headers, content = answer(connection, "/web/?seed=7")
    assert status == 200
    assert content == (bundle / "web/index.html").read_bytes()
    assert headers["Cross-Origin-Opener-Policy"] == "same-origin"
    assert headers["Cross-Origin-Embedder-Policy"] == "require-corp"


@pytest.mark.parametrize(
    "path", ["/web/../../secret", "/..%2fsecret", "/secret", "//etc/passwd", "/web", "/web/nothing.js"]
)
def test_other_files_are_not_given_out(bundle, path):
    (bundle.parent / "secret").write_text("secret")
    with served(page_files(bundle, runtime=None)) as connection:
        assert answer(connection, path)[0] == 404


def test_unchanged_files_are_not_sent_again(bundle):
    with served(page_files(bundle, runtime=None)) as connection:
        _, headers, content = answer(connection, "/web/page.js")
        assert headers["Content-Type"] == "text/javascript; charset=utf-8"
        since = {"If-Modified-Since": headers["Last-Modified"]}
        assert content
        assert answer(connection, "/web/page.js", **since)[::2] == (304, b"")


def test_a_missing_runtime_is_said(bundle, capsys):
    assert not [name for name in page_files(bundle, runtime=None) if name.startswith(f"{RUNTIME_FOLDER}/")]
    assert "fetch it by `make web`" in capsys.readouterr().out


def test_a_named_runtime_needs_its_files(bundle, tmp_path, capsys):
    names = read_hashes((bundle / RUNTIME_HASHES).read_text())
    other = tmp_path / "dist"
    other.mkdir()
    command = ["--bundle", str(bundle), "--onnxruntime-web", str(other)]
    assert serve.main(command) == 2
    assert f"--onnxruntime-web {other} has no {next(iter(names))}" in capsys.readouterr().err
    for name in names:
        (other / name).write_text("another version")
    files = page_files(bundle, runtime=other)
    assert files[f"{RUNTIME_FOLDER}/{next(iter(names))}"] == other / next(iter(names))
    assert "is not onnxruntime-web@" in capsys.readouterr().out


def test_a_bundle_may_contain_its_runtime(bundle):
    runtime = bundle / RUNTIME_FOLDER
    runtime.mkdir()
    (runtime / "ort.mjs").write_text("not the one that the page names")
    with pytest.raises(BundleError, match=r"onnxruntime-web/ort\.mjs is none of the files in"):
        verify_files(bundle)
    checksum = file_records(runtime)["ort.mjs"]["sha256"]
    (bundle / RUNTIME_HASHES).write_text(f"# onnxruntime-web@0\n{checksum}  ort.mjs\n")
    shutil.rmtree(runtime)
    write_manifest(bundle)
    runtime.mkdir()
    (runtime / "ort.mjs").write_text("not the one that the page names")
    assert f"{RUNTIME_FOLDER}/ort.mjs" in page_files(bundle, runtime=None)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda bundle: shutil.rmtree(bundle / "web"), "web/captions.js is missing"),
        (lambda bundle: (bundle / "manifest.json").unlink(), "has no manifest.json"),
        (lambda bundle: (bundle / "web/page.js").write_text(""), "web/page.js was altered"),
    ],
)
def test_a_damaged_bundle_is_one_line(bundle, damage, message, capsys):
    damage(bundle)
    assert serve.main(["--bundle", str(bundle)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


def test_a_bundle_without_page_is_one_line(bundle, capsys):
    shutil.rmtree(bundle / "web")
    write_manifest(bundle)
    assert serve.main(["--bundle", str(bundle)]) == 2
    assert "has no page in web/: compile it with ONNX models" in capsys.readouterr().err


def test_a_port_in_use_is_one_line(bundle, capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert serve.main(["--bundle", str(bundle), "--port", str(port)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line == f"serve: --port {port}: address already in use; give another, or 0 for any free one"


def test_serving_needs_no_torch(bundle):
    program = (
        "import sys; from pathlib import Path; from jobs.serving.bundle_page import page_files; "
        f"page_files(Path({str(bundle)!r}), runtime=None); print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.splitlines()[-1] == "False"
