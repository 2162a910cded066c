"""The deletion list: spellings of one thing are equal, and its files hold nothing but hashes."""

import pickle
import time

import pytest

from pipelines.tables.deletion_list import (
    DeletionKeys,
    DeletionList,
    DeletionRequestError,
    normalize_hash,
    normalize_url,
    read_entries,
    redacted_id,
    sha256_key,
)

URL = "http://example.org/a/b.jpg"


def url_key(url: str) -> bytes:
    return sha256_key(normalize_url(url))


def id_keys(*ids: str) -> DeletionKeys:
    return DeletionKeys(ids=frozenset(map(sha256_key, ids)))


@pytest.mark.parametrize(
    "spelling",
    [
        "https://example.org/a/b.jpg",
        "HTTP://Example.ORG:80/a/b.jpg",
        "https://example.org.:443/a/b.jpg#top",
        "https://me:secret@example.org/a/%62.jpg",
        "  http://example.org/a/b.jpg\n",
    ],
)
def test_spellings_of_one_url_are_equal(spelling):
    assert normalize_url(spelling) == normalize_url(URL)


@pytest.mark.parametrize(
    "other",
    [
        "http://example.org/a/B.jpg",
        "http://example.org/a/b.jpg?x=1",
        "http://example.org:8080/a/b.jpg",
        "http://www.example.org/a/b.jpg",
        "ftp://example.org/a/b.jpg",
        "http://example.org/a%2Fb.jpg",
    ],
)
def test_other_urls_differ(other):
    assert normalize_url(other) != normalize_url(URL)


def test_non_ascii_urls_have_one_spelling():
    assert normalize_url("http://bücher.example/ä b?q=%c3%a4") == normalize_url(
        "https://xn--bcher-kva.example/%C3%A4%20b?q=ä"
    )


@pytest.mark.parametrize(
    "text", ["", "web/00000/0001", "http://[::1", "http://example.org:port/x", "http://"]
)
def test_other_text_is_unchanged(text):
    assert normalize_url(text) == text


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("AB" * 32, "ab" * 32),
        ("sha256:" + "0" * 64, "0" * 64),
        ("d41d8cd98f00b204e9800998ecf8427e", "d41d8cd98f00b204e9800998ecf8427e"),
        ("-0042", "-42"),
        ("9223372036854775807", "9223372036854775807"),
        ("ab" * 20, None),
        ("not a hash", None),
    ],
)
def test_hashes_are_recognized_by_form(text, normal):
    assert normalize_hash(text) == normal


def test_redacted_id_is_stable():
    once = redacted_id("web/00000/someone")
    assert "someone" not in once
    assert redacted_id(once) == once != redacted_id("web/00000/another")


def test_entries_come_with_their_lines(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("\ufeff# whose\n\nhttp://a.org/1\r\nhttps://A.org/1#x\nhttp://a.org/2")
    lines = {url_key("http://a.org/1"): 3, url_key("http://a.org/2"): 5}
    assert read_entries(str(path), kind="url") == lines
    path.write_bytes("\r".join(path.read_text().splitlines()).encode("utf-16-le"))
    assert read_entries(str(path), kind="url") == lines


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (b"0" * 64 + b"\nsecret\n", "line 2 is not a hash"),
        (b"\xff\xfe\n", "line 1 is not UTF-8"),
        (b"# nothing\n", "no entries"),
        (b"a" * 70_000, "line 1 has 70000 bytes"),
    ],
)
def test_unreadable_request_names_the_line_only(tmp_path, text, named):
    path = tmp_path / "list.txt"
    path.write_bytes(text)
    with pytest.raises(DeletionRequestError, match=named) as refused:
        read_entries(str(path), kind="hash")
    assert "secret" not in str(refused.value)


def test_missing_request_is_named(tmp_path):
    with pytest.raises(DeletionRequestError, match=r"none\.txt: No such file"):
        read_entries(str(tmp_path / "none.txt"), kind="id")


def test_hundred_thousand_lines_take_seconds(tmp_path):
    path, url = tmp_path / "list.txt", str(tmp_path / "forgotten")
    path.write_text("".join(f"https://images.example.org/{n // 100}/{n}.jpg?v={n}\n" for n in range(100_000)))
    began = time.process_time()
    DeletionList(url).add(DeletionKeys(urls=frozenset(read_entries(str(path), kind="url"))))
    assert len(DeletionList(url).read()) == 100_000
    assert time.process_time() - began < 20


def test_requests_add_up_and_are_written_once(tmp_path):
    entries = DeletionList(str(tmp_path / "forgotten"))
    assert len(entries.read()) == 0
    first = DeletionKeys(urls=frozenset([url_key("http://a.org/1")]))
    second = first | id_keys("web/1") | DeletionKeys(hashes=frozenset([sha256_key("7")]))
    assert entries.add(first) == first
    reader = DeletionList(entries.url)
    assert len(reader.read()) == 1
    assert entries.add(second) == second - first
    assert entries.add(second) == DeletionKeys()
    assert len(list((tmp_path / "forgotten").iterdir())) == 2
    keys = reader.read()
    assert keys == second
    found = keys.find(ids=["web/1"], urls=["https://A.org/1"], hashes=[7])
    assert {kind for kind, _ in found} == {"url", "hash", "id"}
    assert not keys.find(ids=["web/2"], urls=["http://a.org/2"], hashes=["8", None, 1.5, "x"])


def test_files_hold_hashes_only(tmp_path):
    keys = id_keys("web/secret") | DeletionKeys(urls=frozenset([url_key("http://secret.example/1")]))
    DeletionList(str(tmp_path / "forgotten")).add(keys)
    [path] = (tmp_path / "forgotten").iterdir()
    assert b"secret" not in path.read_bytes()


def test_worker_in_another_folder_reads_the_list(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    entries = DeletionList("run/forgotten")
    entries.add(id_keys("web/1"))
    monkeypatch.chdir("/")
    pickled = pickle.dumps(entries)
    assert sha256_key("web/1") not in pickled
    assert pickle.loads(pickled).read().has_id("web/1")
