"""Tars of img2dataset are read row by row, whatever is wrong with them; and shards are written."""

import itertools
import json
import resource
import tarfile
from collections import Counter
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shard_files import (
    assert_ranges_agree,
    encoded,
    failed,
    only,
    outcomes,
    read,
    shard_rows,
    text,
    write_tar,
)

from pipelines.rejections import Rejection
from pipelines.sources import SourceError
from pipelines.sources.layouts import SPELLINGS
from pipelines.sources.settings import ShardSettings
from pipelines.sources.shards import ShardRow, write_shard
from pipelines.sources.webdataset import Sample, count_rows, list_shards, read_shard
from pipelines.storage.objects import StorageError

# A whole shard.


def test_samples_arrive_in_order_with_metadata(tmp_path: Path) -> None:
    rows = read(write_shard(str(tmp_path), shard_rows(3), index=7, rows_per_shard=100))
    assert [row.id for row in rows] == ["00007/0000700", "00007/0000701", "00007/0000702"]
    second = rows[1]
    assert (second.image, second.caption) == (encoded(1), "image 1")
    assert (second.source_id, second.metadata["similarity"]) == ("http://here/1.jpg", 0.1)
    assert (second.metadata["width"], second.metadata["height"]) == (40, 30)


def test_failed_rows_of_the_sidecar_are_counted(tmp_path: Path) -> None:
    rows = shard_rows(4)
    rows[1] = failed("failed_to_download", "HTTP Error 404: File not found")
    rows[2] = failed("failed_to_resize", "Image decoding error")
    found = read(write_shard(str(tmp_path), rows, index=0))
    assert outcomes(found) == ["ok", "ok", "download_failed", "resize_failed"]
    assert [row.id for row in found] == [f"00000/00000000{key}" for key in (0, 3, 1, 2)]
    assert (found[2].detail, found[2].source) == ("HTTP Error 404: File not found", "00000")


def test_ranges_are_parts_of_the_whole(tmp_path: Path) -> None:
    rows = shard_rows(5)
    rows[2] = failed("failed_to_resize", "")
    shard = write_shard(str(tmp_path), rows, index=0)
    # Torn as well: a range must not depend on how much of the tar was read.
    data = Path(shard.url).read_bytes()
    for length in (len(data), 9_000, 8_300):
        Path(shard.url).write_bytes(data[:length])
        assert_ranges_agree(partial(read_shard, shard, ShardSettings()))


def test_an_empty_tar_has_no_rows(tmp_path: Path) -> None:
    assert read(write_tar(tmp_path / "a.tar", [])) == []
    assert read(write_shard(str(tmp_path), [], index=0)) == []


# Tears.


@pytest.mark.parametrize("with_sidecar", [True, False])
def test_rows_before_any_cut_are_read(tmp_path: Path, with_sidecar: bool) -> None:
    shard = write_shard(str(tmp_path), shard_rows(4), index=0)
    if not with_sidecar:
        (tmp_path / "00000.parquet").unlink()
        (tmp_path / "00000_stats.json").unlink()
    whole = read(shard)
    with tarfile.open(shard.url) as archive:
        ends = [header.offset_data + -(-header.size // 512) * 512 for header in archive.getmembers()][2::3]
    data = Path(shard.url).read_bytes()
    for length in [*range(0, len(data), 301), *ends, *(end - 1 for end in ends)]:
        Path(shard.url).write_bytes(data[:length])
        complete = sum(end <= length for end in ends)
        rows = read(shard)
        assert rows[:complete] == whole[:complete]
        if length >= ends[-1] + 1024:  # the end marker
            assert len(rows) == 4
        elif with_sidecar:
            assert outcomes(rows[complete:]) == ["torn_shard"] * (4 - complete)
            assert {row.id for row in rows} == {row.id for row in whole}
        else:
            assert outcomes(rows[complete:]) == ["torn_shard"]


def test_garbage_inside_a_tar_is_a_tear(tmp_path: Path) -> None:
    shard = write_shard(str(tmp_path), shard_rows(3), index=0)
    data = bytearray(Path(shard.url).read_bytes())
    with tarfile.open(shard.url) as archive:
        third = archive.getmembers()[6].offset
    data[third : third + 512] = b"x" * 512
    Path(shard.url).write_bytes(data)
    assert outcomes(read(shard)) == ["ok", "ok", "torn_shard"]


@pytest.mark.parametrize("ending", [".tar", ".parquet"])
@pytest.mark.parametrize("content", [b"", b"PAR1", b"\xff" * 5000])
def test_a_damaged_file_is_one_rejection(tmp_path: Path, ending: str, content: bytes) -> None:
    (tmp_path / f"a{ending}").write_bytes(content)
    (row,) = read(only(tmp_path))
    reason = "not_a_shard" if (content, ending) == (b"PAR1", ".tar") else "torn_shard"
    assert (row.id, row.reason) == (f"a/{ending}", reason)
    assert count_rows(only(tmp_path)) is None


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.REGTYPE])
@pytest.mark.parametrize("size", [-512, 1 << 40, 1 << 60])
def test_a_false_size_is_a_tear(tmp_path: Path, kind: bytes, size: int) -> None:
    header = tarfile.TarInfo("a.jpg")
    header.type, header.size = kind, size
    (tmp_path / "a.tar").write_bytes(header.tobuf(tarfile.GNU_FORMAT) + b"1" * 2048)
    assert outcomes(read(only(tmp_path)))[-1] == "torn_shard"


def test_a_malformed_extended_header_is_a_tear(tmp_path: Path) -> None:
    body = b"99 nonsense\nGNU.sparse.size=x\n".ljust(512, b"\0")
    header = tarfile.TarInfo("a")
    header.type, header.size = tarfile.XHDTYPE, 30
    (tmp_path / "a.tar").write_bytes(header.tobuf() + body + b"\0" * 1024)
    assert outcomes(read(only(tmp_path))) == ["torn_shard"]


# Members.


@pytest.mark.parametrize(
    "name", ["../../evil", "/etc/evil", "a/../../evil", "..\\evil", "C:\\evil", "\\\\host\\evil", "a" * 1025]
)
def test_names_that_leave_their_folder_are_rejected(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "deep" / "down"
    folder.mkdir(parents=True)
    members = [(f"{name}.jpg", encoded()), (f"{name}.txt", b"evil"), ("b.jpg", encoded()), ("b.txt", b"good")]
    assert outcomes(read(write_tar(folder / "a.tar", members))) == ["unsafe_name", "ok"]
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [folder / "a.tar"]


def test_links_and_devices_are_never_followed(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for key, kind in (("a", tarfile.SYMTYPE), ("b", tarfile.LNKTYPE), ("c", tarfile.FIFOTYPE)):
            header = tarfile.TarInfo(f"{key}.jpg")
            header.type, header.linkname = kind, "/etc/passwd"
            archive.addfile(header)
    assert outcomes(read(only(tmp_path))) == ["not_a_file"] * 3


def test_members_above_the_bound_are_not_read(tmp_path: Path) -> None:
    sizes = {"a.jpg": 1001, "a.txt": 1, "b.jpg": 1000, "b.txt": 101, "c.jpg": 1000, "c.txt": 100}
    shard = write_tar(tmp_path / "a.tar", [(name, b"x" * size) for name, size in sizes.items()])
    bounds = ShardSettings(max_image_bytes=1000, max_text_bytes=100)
    assert outcomes(read(shard, bounds)) == ["oversized_member", "oversized_member", "ok"]


def test_memory_is_bounded_by_a_member(tmp_path: Path) -> None:
    # A sparse file: 256 MiB of tar that take no disk.
    header = tarfile.TarInfo("a.jpg")
    header.size = 256 << 20
    with (tmp_path / "a.tar").open("wb") as file:
        file.write(header.tobuf())
        file.truncate(512 + header.size + 1024)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert outcomes(read(only(tmp_path))) == ["oversized_member"]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB


def test_a_repeated_key_is_a_second_sample(tmp_path: Path) -> None:
    captions = [("a", b"first"), ("a", b"at once"), ("b", b"b"), ("a", b"later")]
    members = [[(f"{key}.jpg", encoded()), (f"{key}.txt", caption)] for key, caption in captions]
    rows = read(write_tar(tmp_path / "a.tar", [*itertools.chain.from_iterable(members)]))
    assert outcomes(rows) == ["ok", "duplicate_key", "ok", "duplicate_key"]
    assert rows[0].caption == "first"


def test_other_members_are_skipped(tmp_path: Path) -> None:
    shard = write_tar(
        tmp_path / "a.tar",
        [
            ("README", b"no dot"), ("._a.jpg", b"a Mac's shadow"), ("./a.JPG", encoded()), ("./a.txt", b"a"),
            ("a.npy", b"unknown"), ("a.png", b"a second image"), ("b.txt", b"alone"),
            ("c/a.jpg", encoded()), ("c/a.txt", b"c"),
        ],
    )  # fmt: skip
    rows = read(shard)
    assert [row.id for row in rows] == ["a/a", "a/b", "a/c/a"]
    assert outcomes(rows) == ["ok", "missing_image", "ok"]
    assert rows[0].image == encoded()


def test_ids_are_printable(tmp_path: Path) -> None:
    (row,) = read(write_tar(tmp_path / "a.tar", [("\udcff.jpg", encoded()), ("\udcff.txt", b"a")]))
    assert row.id.encode().isascii()


# Captions and metadata.


@pytest.mark.parametrize(
    ("txt", "parsed", "beside", "expected"),
    [
        ("t", "j", "s", "t"),
        (None, "j", "s", "j"),
        (None, None, "s", "s"),
        ("", "j", "s", "j"),
        (" \n ", "", "s", "s"),
        (None, None, None, "missing_caption"),
        ("", None, None, "empty_caption"),
        ("", "\u200b", " ", "empty_caption"),
        (b"caf\xe9", "j", "s", "bad_encoding"),
        (None, "\ud800", None, "bad_encoding"),
        ("x" * 100_000, None, None, "x" * 2000),
        (None, 3, None, "missing_caption"),
        (b"\xef\xbb\xbfa\r\n  b", None, None, "a b"),
    ],
)
def test_the_first_caption_not_empty_counts(tmp_path, txt, parsed, beside, expected):
    members = [("a.jpg", encoded()), ("a.json", json.dumps({"caption": parsed}).encode())]
    if txt is not None:
        members.append(("a.txt", txt if isinstance(txt, bytes) else txt.encode()))
    shard = write_tar(tmp_path / "s.tar", members)
    sidecar = pa.table({"key": ["a"], "caption": [beside], "status": ["success"]})
    pq.write_table(sidecar, tmp_path / "s.parquet")
    (row,) = read(shard)
    assert (row.caption if isinstance(row, Sample) else row.reason) == expected


@pytest.mark.parametrize("caption", SPELLINGS["caption"])
@pytest.mark.parametrize("beside", [False, True])
def test_captions_have_any_name(tmp_path: Path, caption: str, beside: bool) -> None:
    json_of = {"a.json": json.dumps({} if beside else {caption: "in the json"}).encode()}
    shard = write_tar(tmp_path / "s.tar", [("a.jpg", encoded()), *json_of.items()])
    if beside:
        pq.write_table(pa.table({"key": ["a"], caption: ["in the sidecar"]}), tmp_path / "s.parquet")
    (row,) = read(shard)
    assert isinstance(row, Sample)
    assert row.caption == ("in the sidecar" if beside else "in the json")


def test_a_missing_json_rejects_nothing(tmp_path: Path) -> None:
    (row,) = read(write_tar(tmp_path / "a.tar", [("a.jpg", encoded()), ("a.txt", b"a")]))
    assert row.metadata == {}
    assert row.source_id == row.id == "a/a"


@pytest.mark.parametrize(
    "content", [b"{", b"[1]", b"\xff\xfe\x00", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"]
)
def test_a_bad_json_rejects_unlisted_rows(tmp_path: Path, content: bytes) -> None:
    shard = write_tar(tmp_path / "s.tar", [("a.jpg", encoded()), ("a.json", content), ("a.txt", b"a")])
    assert outcomes(read(shard)) == ["bad_metadata"]
    pq.write_table(pa.table({"key": ["a"], "punsafe": [0.25]}), tmp_path / "s.parquet")
    (row,) = read(shard)
    assert row.metadata["punsafe"] == 0.25


@pytest.mark.parametrize("content", [b"", b"PAR1 and nothing more", b"x" * 1000, None])
def test_an_unreadable_sidecar_rejects_samples_without_json(tmp_path: Path, content: bytes | None) -> None:
    members = [
        ("a.jpg", encoded()),
        ("a.txt", b"a"),
        ("a.json", b"{}"),
        ("b.jpg", encoded()),
        ("b.txt", b"b"),
    ]
    shard = write_tar(tmp_path / "s.tar", members)
    if content is None:
        pq.write_table(pa.table({"name": ["a"]}), tmp_path / "s.parquet")
    else:
        (tmp_path / "s.parquet").write_bytes(content)
    assert outcomes(read(shard)) == ["ok", "bad_sidecar", "bad_sidecar"]


def test_rows_missing_from_a_whole_tar(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "s.tar", [("a.jpg", encoded()), ("a.txt", b"a")])
    statuses = ["success", "success", "an unknown status"]
    pq.write_table(pa.table({"key": ["a", "b", "c"], "status": statuses}), tmp_path / "s.parquet")
    assert outcomes(read(shard)) == ["ok", "missing_sample", "missing_sample"]


def test_invalid_utf8_in_a_sidecar_hides_nothing(tmp_path: Path) -> None:
    pq.write_table(pa.table({"key": ["a", "b"], "caption": text(b"\xe9", b"good")}), tmp_path / "s.parquet")
    shard = write_tar(tmp_path / "s.tar", [("a.jpg", encoded()), ("b.jpg", encoded())])
    assert outcomes(read(shard)) == ["missing_caption", "ok"]


# Keys with dots.


def named(*names: str) -> list[tuple[str, bytes]]:
    """Members with content of their kind."""
    return [(name, encoded() if name.endswith("g") else b"{}" if "json" in name else b"a") for name in names]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a.v1.x.jpg", "a.v1.x.txt", "a.v2.x.jpg", "a.v2.x.txt"], {"a.v1.x": "ok", "a.v2.x": "ok"}),
        (["a.1.jpg", "a.2.jpg", "a.2.txt"], {"a.1": "missing_caption", "a.2": "ok"}),
        (
            ["a.1.jpg", "a.2.jpg", "b.jpg", "b.txt"],
            {"a.1": "missing_caption", "a.2": "missing_caption", "b": "ok"},
        ),
        # Extensions with dots, as webdataset has them, in any order.
        (["a.left.jpg", "a.right.jpg", "a.txt", "b.jpg", "b.txt"], {"a": "missing_image", "b": "ok"}),
        (["a.depth.png", "a.jpg", "a.seg.png", "a.txt", "a.cls.json"], {"a": "ok"}),
        (["a.1.jpg", "a.1.txt", "a.jpg", "a.txt"], {"a.1": "ok", "a": "ok"}),
        (["a.1.x", "a.1.jpg", "a.1.txt"], {"a": "missing_image"}),
    ],
)
def test_keys_may_have_dots(tmp_path: Path, names: list[str], expected: dict[str, str]) -> None:
    shard = write_tar(tmp_path / "s.tar", named(*names))
    rows = read(shard)
    assert dict(zip((row.id.removeprefix("s/") for row in rows), outcomes(rows), strict=True)) == expected
    assert_ranges_agree(partial(read_shard, shard, ShardSettings()))


def test_extensions_with_dots_are_named(tmp_path: Path) -> None:
    (row,) = read(write_tar(tmp_path / "s.tar", named("a.left.jpg", "a.right.jpg", "a.txt")))
    assert isinstance(row, Rejection)
    assert row.detail == "extensions: left.jpg, right.jpg, txt"


def test_a_sidecar_knows_dotted_keys(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "s.tar", named("a.1.jpg", "a.2.jpg"))
    pq.write_table(pa.table({"key": ["a.1", "a.2"], "caption": ["one", "two"]}), tmp_path / "s.parquet")
    assert [row.caption for row in read(shard) if isinstance(row, Sample)] == ["one", "two"]


# Listing.


def test_files_globs_and_folders_name_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index in (2, 0, 1):
        write_shard(str(tmp_path), shard_rows(1), index=index)

    def names(url: str) -> list[str]:
        return [shard.name for shard in list_shards(url)]

    for url in (f"{tmp_path}", f"{tmp_path}/", f"file://{tmp_path}", f"{tmp_path}/*.tar"):
        assert names(url) == ["00000", "00001", "00002"]
    assert names(f"{tmp_path}/0000[12].tar") == ["00001", "00002"]
    assert names(f"{tmp_path}/00001.tar") == ["00001"]
    # The URLs are absolute: workers run in another folder.
    monkeypatch.chdir(tmp_path)
    assert list_shards("*.tar") == list_shards(f"{tmp_path}/*.tar")


def test_shards_of_several_folders_have_distinct_names(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write_shard(str(tmp_path / folder), shard_rows(1), index=0)
    assert [shard.name for shard in list_shards(f"{tmp_path}/*/*.tar")] == ["a/00000", "b/00000"]


def test_a_folder_may_have_brackets(tmp_path: Path) -> None:
    write_shard(str(tmp_path / "a[1]"), shard_rows(1), index=0)
    assert len(list_shards(str(tmp_path / "a[1]"))) == 1


@pytest.mark.parametrize("path", ["", "/none", "/none.tar", "/*.tar", "/notes.txt"])
def test_no_shards_are_an_error(tmp_path: Path, path: str) -> None:
    (tmp_path / "notes.txt").write_text("no tar")
    with pytest.raises(SourceError, match=r"no shards at .*\.tar"):
        list_shards(f"{tmp_path}{path}")


# Writing.


def test_shards_have_the_layout_of_img2dataset(tmp_path: Path) -> None:
    rows = [*shard_rows(2), failed("failed_to_download", "HTTP Error 404: File not found")]
    write_shard(str(tmp_path), rows, index=3, rows_per_shard=10_000)
    with tarfile.open(tmp_path / "00003.tar") as archive:
        endings = ("jpg", "json", "txt")
        assert archive.getnames() == [f"00003{i:04d}.{ending}" for i in (0, 1) for ending in endings]
        content = archive.extractfile("000030001.json")
        assert content is not None
        values = json.load(content)
        assert all((header.mtime, header.uid, header.uname) == (0, 0, "") for header in archive.getmembers())
    table = pq.read_table(tmp_path / "00003.parquet")
    own = "caption url key status error_message width height original_width original_height exif sha256"
    assert list(values) == table.column_names == ["similarity", *own.split()]
    assert table.schema.field("width").type == pa.int32()
    assert table.column("width").to_pylist() == [40, 40, None]
    stats = json.loads((tmp_path / "00003_stats.json").read_text())
    assert (stats["count"], stats["successes"], stats["failed_to_download"]) == (3, 2, 1)
    assert stats["status_dict"] == {"HTTP Error 404: File not found": 1, "success": 2}


def test_equal_rows_give_equal_bytes(tmp_path: Path) -> None:
    for folder in ("a", "b", "a"):
        write_shard(str(tmp_path / folder), shard_rows(3), index=0)
    names = ["00000.parquet", "00000.tar", "00000_stats.json"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with pytest.raises(SourceError, match="exists with other content"):
        write_shard(str(tmp_path / "a"), shard_rows(2), index=0)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == names


@pytest.mark.parametrize(
    ("image", "status", "message"),
    [
        (None, "lost", "status 'lost'"),
        (None, "success", "needs an image"),
        (b"x", "failed_to_resize", "has no image"),
    ],
)
def test_contradictory_rows_are_refused(image: bytes | None, status: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShardRow(image=image, caption=None, status=status)


def test_shards_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a shard holds 2"):
        write_shard(str(tmp_path), shard_rows(3), index=0, rows_per_shard=2)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        write_shard(str(tmp_path / "file"), shard_rows(1), index=0)


def test_broken_images_are_written_without_size(tmp_path: Path) -> None:
    rows = [ShardRow(image=b"text", caption="a"), ShardRow(image=b"", caption=None)]
    found = read(write_shard(str(tmp_path), rows, index=0))
    assert Counter(outcomes(found)) == {"ok": 1, "missing_caption": 1}
    assert "width" not in found[0].metadata
