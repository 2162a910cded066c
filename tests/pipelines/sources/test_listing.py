"""Files are found in folders, by globs, braces, several URLs and links; none is left out in silence."""

import re
from pathlib import Path

import fsspec
import pytest

from pipelines.sources import SourceError
from pipelines.sources.listing import list_files
from pipelines.sources.urls import expand_urls


def names(url: str) -> list[str]:
    return [file.name for file in list_files(url, endings=(".tar",))]


def write(folder: Path, *files: str) -> None:
    for file in files:
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text("x")


@pytest.mark.parametrize(
    ("given", "expected"),
    # As bash expands them.
    [
        ("s3://b/{8..11}.tar", ["s3://b/8.tar", "s3://b/9.tar", "s3://b/10.tar", "s3://b/11.tar"]),
        ("{008..10}", ["008", "009", "010"]),
        ("{3..1}", ["3", "2", "1"]),
        ("{0..10..5}", ["0", "5", "10"]),
        ("{-01..1}", ["-01", "000", "001"]),
        ("x{a,b{1,2}}", ["xa", "xb1", "xb2"]),
        ("{a,}b{1..2}", ["ab1", "ab2", "b1", "b2"]),
        ("a{b}c{}", ["a{b}c{}"]),
        ("a::s3://c/{1,2}::a", ["a", "s3://c/1", "s3://c/2"]),
    ],
)
def test_braces_and_colons_are_expanded(given: str, expected: list[str]) -> None:
    assert sorted(expand_urls(given)) == sorted(expected)


@pytest.mark.parametrize(
    ("url", "message"), [("a.tar::", "empty URL"), ("s3://b/{0..999}", "more than 100 URLs")]
)
def test_unusable_notations_are_refused(url: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.sources.urls.MAX_URLS", 100)
    with pytest.raises(SourceError, match=message):
        list_files(url, endings=(".tar",))


def test_several_urls_have_distinct_names(tmp_path: Path) -> None:
    write(tmp_path, "a/00000.tar", "a/00001.tar", "b/00000.tar", "b/00002.txt")
    assert names(f"{tmp_path}/a/00000.tar::{tmp_path}/b/00000.tar") == ["a/00000", "b/00000"]
    assert names(f"{tmp_path}/{{a,b}}/00000.tar") == ["a/00000", "b/00000"]
    assert names(f"{tmp_path}/a::{tmp_path}/b/*.tar") == ["a/00000", "a/00001", "b/00000"]
    # A range names its files as a glob and the folder do.
    assert names(f"{tmp_path}/a/{{00000..00001}}.tar") == names(f"{tmp_path}/a") == ["00000", "00001"]


@pytest.mark.parametrize(
    ("url", "missing"),
    [("/a/{0..2}.tar", "/a/2.tar"), ("/a/0.tar::/none.tar", "/none.tar"), ("/a::/*.x", "/*.x")],
)
def test_each_of_several_urls_names_something(tmp_path: Path, url: str, missing: str) -> None:
    write(tmp_path, "a/0.tar", "a/1.tar")
    with pytest.raises(SourceError, match=re.escape(f"nothing at {tmp_path}{missing}:")):
        names("::".join(f"{tmp_path}{part}" for part in url.split("::")))


def test_an_existing_name_is_not_expanded(tmp_path: Path) -> None:
    write(tmp_path, "{1,2}.tar", "1.tar")
    assert names(f"{tmp_path}/{{1,2}}.tar") == ["{1,2}"]


def test_urls_of_a_store_are_expanded() -> None:
    store = fsspec.filesystem("memory")
    for name in ("a/0.tar", "a/1.tar", "b/0.tar"):
        store.pipe_file(f"/expanded/{name}", b"x")
    assert names("memory://expanded/{a,b}/0.tar::memory://expanded/a/{0..1}.tar") == ["a/0", "a/1", "b/0"]
    files = list_files("memory://expanded/a/{0..1}.tar", endings=(".tar",))
    assert [file.url for file in files] == ["memory:///expanded/a/0.tar", "memory:///expanded/a/1.tar"]


def test_links_are_followed(tmp_path: Path) -> None:
    write(tmp_path, "a/0.tar", "b/1.tar")
    (tmp_path / "a" / "2.tar").symlink_to(tmp_path / "b" / "1.tar")
    (tmp_path / "a" / "folder.tar").symlink_to(tmp_path / "b")
    for url in (f"{tmp_path}/a", f"{tmp_path}/a/*.tar", f"{tmp_path}/a/{{0,2}}.tar"):
        files = list_files(url, endings=(".tar",))
        assert [(file.name, file.size) for file in files] == [("0", 1), ("2", 1)]
    (tmp_path / "b" / "1.tar").unlink()
    with pytest.raises(SourceError, match=r"2\.tar is a link to .*1\.tar, which does not exist"):
        list_files(f"{tmp_path}/a", endings=(".tar",))
