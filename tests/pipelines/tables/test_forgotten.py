"""The list of what is forgotten: spellings that are one thing, and nothing but hashes in its files."""

from __future__ import annotations

import pickle
import time
from pathlib import Path

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
def test_spellings_of_one_address_are_equal(spelling):
    assert normalize_url(spelling) == normalize_url("http://example.org/a/b.jpg")


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
def test_other_addresses_are_not(other):
    assert normalize_url(other) != normalize_url("http://example.org/a/b.jpg")


def test_escapes_and_letters_beyond_ascii_have_one_spelling():
    assert normalize_url("http://bücher.example/ä b?q=%c3%a4") == normalize_url(
        "https://xn--bcher-kva.example/%C3%A4%20b?q=ä"
    )


@pytest.mark.parametrize("odd", ["", "web/00000/0001", "http://[::1", "http://example.org:port/x", "http://"])
def test_what_is_no_address_stays_as_it_is(odd):
    assert normalize_url(odd) == odd


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
def test_hashes_are_told_apart_by_their_form(text, normal):
    assert normalize_hash(text) == normal


def test_a_hidden_id_tells_nothing_and_stays_itself():
    once = redacted_id("web/00000/someone")
    assert "someone" not in once
    assert redacted_id(once) == once != redacted_id("web/00000/another")


def lines(path: Path, text: str | bytes) -> str:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def test_entries_are_read_with_their_lines(tmp_path):
    path = lines(
        tmp_path / "list.txt", "\ufeff# whose\n\nhttp://a.org/1\r\nhttps://A.org/1#x\nhttp://a.org/2"
    )
    assert read_entries(path, kind="url") == {
        sha256_key(normalize_url("http://a.org/1")): 3,
        sha256_key(normalize_url("http://a.org/2")): 5,
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0" * 64 + "\nsecret\n", "line 2 is not a hash"),
        (b"\xff\xfe\n", "line 1 is not UTF-8"),
        ("# nothing\n", "has no entries"),
        ("a" * 70_000, "line 1 has 70000 bytes"),
    ],
)
def test_a_list_that_cannot_be_read_is_refused_and_its_lines_are_not_repeated(tmp_path, text, said):
    with pytest.raises(DeletionRequestError, match=said) as refused:
        read_entries(lines(tmp_path / "list.txt", text), kind="hash")
    assert "secret" not in str(refused.value)


def test_a_list_that_is_not_there_is_said(tmp_path):
    with pytest.raises(DeletionRequestError, match=r"none\.txt: No such file"):
        read_entries(str(tmp_path / "none.txt"), kind="id")


def test_a_hundred_thousand_lines_take_a_moment(tmp_path):
    text = "".join(f"https://images.example.org/{n // 100}/{n}.jpg?v={n}\n" for n in range(100_000))
    path = lines(tmp_path / "list.txt", text)
    began = time.process_time()
    entries = read_entries(path, kind="url")
    wanted = DeletionList(str(tmp_path / "forgotten"))
    wanted.add(DeletionKeys(urls=frozenset(entries)))
    assert len(DeletionList(wanted.url).read()) == 100_000
    assert time.process_time() - began < 20


def test_requests_add_up_and_what_is_there_is_not_written_again(tmp_path):
    wanted = DeletionList(str(tmp_path / "forgotten"))
    assert len(wanted.read()) == 0
    first = DeletionKeys(urls=frozenset([sha256_key(normalize_url("http://a.org/1"))]))
    second = first | DeletionKeys(ids=frozenset([sha256_key("web/1")]), hashes=frozenset([sha256_key("7")]))
    assert wanted.add(first) == first
    before = DeletionList(wanted.url)
    assert len(before.read()) == 1
    assert wanted.add(second) == second - first
    assert wanted.add(second) == DeletionKeys()
    assert len(list((tmp_path / "forgotten").iterdir())) == 2
    found = before.read()
    assert found == second
    assert {kind for kind, _ in found.find(ids=["web/1"], urls=["https://A.org/1"], hashes=[7])} == {
        "url",
        "hash",
        "id",
    }
    assert not found.find(ids=["web/2"], urls=["http://a.org/2"], hashes=["8", None, 1.5, "x"])


def test_the_files_hold_hashes_alone(tmp_path):
    wanted = DeletionList(str(tmp_path / "forgotten"))
    wanted.add(
        DeletionKeys(
            urls=frozenset([sha256_key(normalize_url("http://secret.example/1"))]),
            ids=frozenset([sha256_key("web/secret")]),
        )
    )
    [path] = (tmp_path / "forgotten").iterdir()
    assert b"secret" not in path.read_bytes()


def test_a_worker_that_stands_elsewhere_finds_the_list(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wanted = DeletionList("run/forgotten")
    wanted.add(DeletionKeys(ids=frozenset([sha256_key("web/1")])))
    monkeypatch.chdir("/")
    assert pickle.loads(pickle.dumps(wanted)).read().has_id("web/1")


def test_another_process_reads_the_list_for_itself(tmp_path):
    wanted = DeletionList(str(tmp_path / "forgotten"))
    wanted.add(DeletionKeys(ids=frozenset([sha256_key("web/1")])))
    sent = pickle.dumps(wanted)
    assert sha256_key("web/1") not in sent
    assert pickle.loads(sent).read().has_id("web/1")
