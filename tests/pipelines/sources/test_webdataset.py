import io
import json
import resource
import tarfile
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.rejections import Rejection
from pipelines.sources import SourceError
from pipelines.sources.settings import ShardSettings
from pipelines.sources.shards import ShardRow, write_shard
from pipelines.sources.webdataset import Sample, Shard, list_shards, read_shard
from pipelines.storage.objects import StorageError

SETTINGS = ShardSettings()


def jpeg(shade: int = 0, *, size: tuple[int, int] = (40, 30)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (shade % 256, 80, 160)).save(buffer, "JPEG")
    return buffer.getvalue()


def pictures(count: int) -> list[ShardRow]:
    return [
        ShardRow(
            image=jpeg(i), caption=f"picture {i}", metadata={"similarity": i / 10}, url=f"http://here/{i}.jpg"
        )
        for i in range(count)
    ]


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Shard:
    """A tar of any members, well-formed or not, without a sidecar."""
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
    return list_shards(str(path))[0]


def read(shard: Shard, settings: ShardSettings = SETTINGS) -> list[Sample | Rejection]:
    rows = list(read_shard(shard, settings))
    assert [row.ordinal for row in rows] == list(range(len(rows)))
    return rows


def outcome(row: Sample | Rejection) -> str:
    return row.reason if isinstance(row, Rejection) else "ok"


def outcomes(shard: Shard, settings: ShardSettings = SETTINGS) -> list[str]:
    return [outcome(row) for row in read(shard, settings)]


# A whole shard.


def test_samples_arrive_in_order_with_caption_metadata_and_origin(tmp_path: Path) -> None:
    shard = write_shard(str(tmp_path), pictures(3), index=7, rows_per_shard=100)
    rows = read(shard)
    assert [row.id for row in rows] == ["00007/0000700", "00007/0000701", "00007/0000702"]
    second = rows[1]
    assert isinstance(second, Sample)
    assert second.image == jpeg(1)
    assert second.caption == "picture 1"
    assert second.source_id == "http://here/1.jpg"
    assert second.metadata["similarity"] == 0.1
    assert (second.metadata["width"], second.metadata["height"]) == (40, 30)


def test_failed_rows_that_only_the_sidecar_knows_are_accounted_for(tmp_path: Path) -> None:
    rows = pictures(4)
    rows[1] = ShardRow(image=None, caption="a", metadata={"similarity": None}, status="failed_to_download",
                      error_message="HTTP Error 404: File not found")  # fmt: skip
    rows[2] = ShardRow(image=None, caption="b", metadata={"similarity": None}, status="failed_to_resize",
                      error_message="Image decoding error")  # fmt: skip
    found = read(write_shard(str(tmp_path), rows, index=0))
    assert [outcome(row) for row in found] == ["ok", "ok", "download_failed", "resize_failed"]
    assert [row.id for row in found] == [
        "00000/000000000",
        "00000/000000003",
        "00000/000000001",
        "00000/000000002",
    ]
    assert isinstance(found[2], Rejection)
    assert found[2].detail == "HTTP Error 404: File not found"
    assert found[2].source == "00000"


def test_any_range_is_that_part_of_the_whole(tmp_path: Path) -> None:
    rows = pictures(5)
    rows[2] = ShardRow(image=None, caption="", metadata={"similarity": None}, status="failed_to_resize")
    shard = write_shard(str(tmp_path), rows, index=0)
    # Torn as well: what a range holds must not depend on how much of the tar was read.
    data = Path(shard.url).read_bytes()
    for length in (len(data), 9_000, 8_300):
        Path(shard.url).write_bytes(data[:length])
        whole = read(shard)
        for start in range(7):
            for stop in [*range(start, 8), None]:
                assert list(read_shard(shard, SETTINGS, start=start, stop=stop)) == whole[start:stop]


def test_a_range_that_is_none_is_refused(tmp_path: Path) -> None:
    shard = write_shard(str(tmp_path), pictures(1), index=0)
    with pytest.raises(ValueError, match="start 3 and stop 2"):
        list(read_shard(shard, SETTINGS, start=3, stop=2))


def test_an_empty_tar_has_no_rows(tmp_path: Path) -> None:
    assert read(write_tar(tmp_path / "a.tar", [])) == []
    assert read(write_shard(str(tmp_path), [], index=0)) == []


# Tears.


@pytest.mark.parametrize("with_sidecar", [True, False])
def test_wherever_the_tar_is_cut_rows_before_the_tear_are_kept(tmp_path: Path, with_sidecar: bool) -> None:
    shard = write_shard(str(tmp_path), pictures(4), index=0)
    if not with_sidecar:
        (tmp_path / "00000.parquet").unlink()
    whole = read(shard)
    with tarfile.open(shard.url) as archive:
        ends = [header.offset_data + -(-header.size // 512) * 512 for header in archive.getmembers()][2::3]
    data = Path(shard.url).read_bytes()
    for length in [*range(0, len(data), 301), *ends, *(end - 1 for end in ends)]:
        Path(shard.url).write_bytes(data[:length])
        kept = sum(end <= length for end in ends)
        rows = read(shard)
        assert rows[:kept] == whole[:kept]
        if length >= ends[-1] + 512:  # the end marker's first block
            assert len(rows) == 4
        elif with_sidecar:
            assert [outcome(row) for row in rows[kept:]] == ["torn_shard"] * (4 - kept)
            assert {row.id for row in rows} == {row.id for row in whole}
        else:
            assert [outcome(row) for row in rows[kept:]] == ["torn_shard"]


def test_a_tar_that_turns_into_something_else_is_torn(tmp_path: Path) -> None:
    shard = write_shard(str(tmp_path), pictures(3), index=0)
    data = bytearray(Path(shard.url).read_bytes())
    with tarfile.open(shard.url) as archive:
        third = archive.getmembers()[6].offset
    data[third : third + 512] = b"x" * 512
    Path(shard.url).write_bytes(data)
    assert outcomes(shard) == ["ok", "ok", "torn_shard"]


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"\xff" * 5000])
def test_a_file_that_is_no_tar_is_one_rejection(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    (row,) = read(list_shards(str(tmp_path))[0])
    assert isinstance(row, Rejection)
    assert (row.id, row.reason) == ("a/.tar", "torn_shard")


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.REGTYPE])
@pytest.mark.parametrize("size", [-512, 1 << 40, 1 << 60])
def test_a_header_that_lies_about_its_size_is_a_tear(tmp_path: Path, kind: bytes, size: int) -> None:
    header = tarfile.TarInfo("a.jpg")
    header.type, header.size = kind, size
    (tmp_path / "a.tar").write_bytes(header.tobuf(tarfile.GNU_FORMAT) + b"1" * 2048)
    assert outcomes(list_shards(str(tmp_path))[0])[-1] == "torn_shard"


def test_a_malformed_extended_header_is_a_tear(tmp_path: Path) -> None:
    body = b"99 nonsense\nGNU.sparse.size=x\n".ljust(512, b"\0")
    header = tarfile.TarInfo("a")
    header.type, header.size = tarfile.XHDTYPE, 30
    (tmp_path / "a.tar").write_bytes(header.tobuf() + body + b"\0" * 1024)
    assert outcomes(list_shards(str(tmp_path))[0]) == ["torn_shard"]


# Members.


@pytest.mark.parametrize(
    "name", ["../../evil", "/etc/evil", "a/../../evil", "..\\evil", "C:\\evil", "\\\\host\\evil", "a" * 1025]
)
def test_a_name_that_leaves_its_folder_is_rejected_and_nothing_is_written(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "deep" / "down"
    folder.mkdir(parents=True)
    shard = write_tar(
        folder / "a.tar",
        [(f"{name}.jpg", jpeg()), (f"{name}.txt", b"evil"), ("b.jpg", jpeg()), ("b.txt", b"good")],
    )
    assert outcomes(shard) == ["unsafe_name", "ok"]
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [folder / "a.tar"]


def test_links_and_devices_are_never_followed(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for key, kind in (("a", tarfile.SYMTYPE), ("b", tarfile.LNKTYPE), ("c", tarfile.FIFOTYPE)):
            header = tarfile.TarInfo(f"{key}.jpg")
            header.type, header.linkname = kind, "/etc/passwd"
            archive.addfile(header)
    assert outcomes(list_shards(str(tmp_path))[0]) == ["not_a_file"] * 3


def test_a_member_above_the_bound_is_not_read(tmp_path: Path) -> None:
    bounds = ShardSettings(max_image_bytes=1000, max_text_bytes=100)
    shard = write_tar(
        tmp_path / "a.tar",
        [
            ("a.jpg", b"x" * 1001), ("a.txt", b"a"),
            ("b.jpg", b"x" * 1000), ("b.txt", b"b" * 101),
            ("c.jpg", b"x" * 1000), ("c.txt", b"c" * 100),
        ],
    )  # fmt: skip
    assert outcomes(shard, bounds) == ["oversized_member", "oversized_member", "ok"]


def test_memory_is_bounded_by_a_member_and_not_by_the_tar(tmp_path: Path) -> None:
    # A sparse file: 256 MiB of tar that take no disk.
    header = tarfile.TarInfo("a.jpg")
    header.size = 256 << 20
    with (tmp_path / "a.tar").open("wb") as file:
        file.write(header.tobuf())
        file.truncate(512 + header.size + 1024)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert outcomes(list_shards(str(tmp_path))[0]) == ["oversized_member"]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB


def test_a_key_that_comes_again_is_a_second_sample(tmp_path: Path) -> None:
    shard = write_tar(
        tmp_path / "a.tar",
        [
            ("a.jpg", jpeg(1)), ("a.txt", b"first"), ("a.jpg", jpeg(2)), ("a.txt", b"at once"),
            ("b.jpg", jpeg()), ("b.txt", b"b"), ("a.jpg", jpeg(3)), ("a.txt", b"later"),
        ],
    )  # fmt: skip
    rows = read(shard)
    assert [outcome(row) for row in rows] == ["ok", "duplicate_key", "ok", "duplicate_key"]
    assert isinstance(rows[0], Sample)
    assert rows[0].caption == "first"


def test_members_that_are_no_sample_or_of_unknown_kind(tmp_path: Path) -> None:
    shard = write_tar(
        tmp_path / "a.tar",
        [
            ("README", b"no dot"), ("._a.jpg", b"a Mac's shadow"), ("./a.JPG", jpeg()), ("./a.txt", b"a"),
            ("a.npy", b"unknown"), ("a.png", b"a second picture"), ("b.txt", b"alone"),
            ("c/a.jpg", jpeg()), ("c/a.txt", b"c"),
        ],
    )  # fmt: skip
    rows = read(shard)
    assert [(row.id, outcome(row)) for row in rows] == [
        ("a/a", "ok"),
        ("a/b", "missing_image"),
        ("a/c/a", "ok"),
    ]
    assert isinstance(rows[0], Sample)
    assert rows[0].image == jpeg()


def test_a_name_that_is_no_utf8_gives_a_printable_id(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", [("\udcff.jpg", jpeg()), ("\udcff.txt", b"a")])
    (row,) = read(shard)
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
def test_the_caption_is_the_first_that_is_not_empty(
    tmp_path: Path, txt: str | bytes | None, parsed: object, beside: str | None, expected: str
) -> None:
    members = [("a.jpg", jpeg()), ("a.json", json.dumps({"caption": parsed}).encode())]
    if txt is not None:
        members.append(("a.txt", txt if isinstance(txt, bytes) else txt.encode()))
    shard = write_tar(tmp_path / "s.tar", members)
    pq.write_table(
        pa.table({"key": ["a"], "caption": [beside], "status": ["success"]}), tmp_path / "s.parquet"
    )
    (row,) = read(shard)
    assert (row.caption if isinstance(row, Sample) else row.reason) == expected


def test_a_missing_json_rejects_nothing(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", [("a.jpg", jpeg()), ("a.txt", b"a")])
    (row,) = read(shard)
    assert isinstance(row, Sample)
    assert row.metadata == {}
    assert row.source_id == row.id == "a/a"


@pytest.mark.parametrize(
    "content", [b"{", b"[1]", b"\xff\xfe\x00", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"]
)
def test_a_json_that_does_not_parse_rejects_unless_the_sidecar_knows_the_row(
    tmp_path: Path, content: bytes
) -> None:
    shard = write_tar(tmp_path / "s.tar", [("a.jpg", jpeg()), ("a.json", content), ("a.txt", b"a")])
    assert outcomes(shard) == ["bad_metadata"]
    pq.write_table(pa.table({"key": ["a"], "punsafe": [0.25]}), tmp_path / "s.parquet")
    (row,) = read(shard)
    assert isinstance(row, Sample)
    assert row.metadata["punsafe"] == 0.25


def test_a_sidecar_that_cannot_be_read_is_one_rejection(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "s.tar", [("a.jpg", jpeg()), ("a.txt", b"a")])
    for content in (b"", b"PAR1 and nothing more", b"x" * 1000):
        (tmp_path / "s.parquet").write_bytes(content)
        assert outcomes(shard) == ["ok", "bad_sidecar"]
    pq.write_table(pa.table({"name": ["a"]}), tmp_path / "s.parquet")
    assert outcomes(shard) == ["ok", "bad_sidecar"]


def test_a_row_that_the_sidecar_promises_and_a_whole_tar_lacks(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "s.tar", [("a.jpg", jpeg()), ("a.txt", b"a")])
    statuses = ["success", "success", "an unknown status"]
    pq.write_table(pa.table({"key": ["a", "b", "c"], "status": statuses}), tmp_path / "s.parquet")
    assert outcomes(shard) == ["ok", "missing_sample", "missing_sample"]


def test_a_sidecar_string_that_is_no_utf8_hides_nothing_else(tmp_path: Path) -> None:
    captions = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\5\0\0\0"), pa.py_buffer(b"\xe9good")]
    )
    pq.write_table(pa.table({"key": ["a", "b"], "caption": captions}), tmp_path / "s.parquet")
    shard = write_tar(tmp_path / "s.tar", [("a.jpg", jpeg()), ("b.jpg", jpeg())])
    assert outcomes(shard) == ["missing_caption", "ok"]


# Where shards lie.


def test_a_tar_a_glob_and_a_folder_mean_the_same_shards(tmp_path: Path) -> None:
    for index in (2, 0, 1):
        write_shard(str(tmp_path), pictures(1), index=index)
    names = ["00000", "00001", "00002"]
    assert [shard.name for shard in list_shards(str(tmp_path))] == names
    assert [shard.name for shard in list_shards(f"{tmp_path}/")] == names
    assert [shard.name for shard in list_shards(f"file://{tmp_path}")] == names
    assert list_shards(f"{tmp_path}/*.tar") == list_shards(str(tmp_path))
    assert [shard.name for shard in list_shards(f"{tmp_path}/0000[12].tar")] == names[1:]
    assert list_shards(f"{tmp_path}/00001.tar") == list_shards(str(tmp_path))[1:2]


def test_shards_of_several_folders_keep_different_names(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write_shard(str(tmp_path / folder), pictures(1), index=0)
    assert [shard.name for shard in list_shards(f"{tmp_path}/*/*.tar")] == ["a/00000", "b/00000"]


def test_a_folder_with_brackets_in_its_name_is_a_folder(tmp_path: Path) -> None:
    write_shard(str(tmp_path / "a[1]"), pictures(1), index=0)
    assert len(list_shards(str(tmp_path / "a[1]"))) == 1


@pytest.mark.parametrize("place", ["", "/none", "/none.tar", "/*.tar", "/notes.txt"])
def test_no_shards_is_an_error_that_says_what_to_give(tmp_path: Path, place: str) -> None:
    (tmp_path / "notes.txt").write_text("no tar")
    with pytest.raises(SourceError, match=r"no shards at .*: give a \.tar, a folder"):
        list_shards(f"{tmp_path}{place}")


# Writing.


def test_the_written_shard_has_the_layout_of_img2dataset(tmp_path: Path) -> None:
    rows = pictures(2)
    rows.append(ShardRow(image=None, caption="c", metadata={"similarity": 0.5}, status="failed_to_download",
                        error_message="HTTP Error 404: File not found"))  # fmt: skip
    write_shard(str(tmp_path), rows, index=3, rows_per_shard=10_000)
    with tarfile.open(tmp_path / "00003.tar") as archive:
        assert archive.getnames() == [
            f"00003{i:04d}.{ending}" for i in (0, 1) for ending in ("jpg", "json", "txt")
        ]
        content = archive.extractfile("000030001.json")
        assert content is not None
        values = json.load(content)
        assert all((header.mtime, header.uid, header.uname) == (0, 0, "") for header in archive.getmembers())
    columns = [
        "similarity", "caption", "url", "key", "status", "error_message", "width", "height", "original_width",
        "original_height", "exif", "sha256",
    ]  # fmt: skip
    assert list(values) == columns
    table = pq.read_table(tmp_path / "00003.parquet")
    assert table.column_names == columns
    assert table.schema.field("width").type == pa.int32()
    assert table.column("width").to_pylist() == [40, 40, None]
    stats = json.loads((tmp_path / "00003_stats.json").read_text())
    assert (stats["count"], stats["successes"], stats["failed_to_download"]) == (3, 2, 1)
    assert stats["status_dict"] == {"HTTP Error 404: File not found": 1, "success": 2}


def test_the_same_rows_give_the_same_bytes_and_other_rows_are_refused(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write_shard(str(tmp_path / folder), pictures(3), index=0)
    for name in ("00000.tar", "00000.parquet", "00000_stats.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    write_shard(str(tmp_path / "a"), pictures(3), index=0)
    with pytest.raises(SourceError, match="exists with other content"):
        write_shard(str(tmp_path / "a"), pictures(2), index=0)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "00000.parquet", "00000.tar", "00000_stats.json",
    ]  # fmt: skip


def test_rows_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="status 'lost'"):
        ShardRow(image=None, caption=None, status="lost")
    with pytest.raises(ValueError, match="needs an image"):
        ShardRow(image=None, caption=None)
    with pytest.raises(ValueError, match="has no image"):
        ShardRow(image=b"x", caption=None, status="failed_to_resize")
    with pytest.raises(ValueError, match="a shard holds 2"):
        write_shard(str(tmp_path), pictures(3), index=0, rows_per_shard=2)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        write_shard(str(tmp_path / "file"), pictures(1), index=0)


def test_pictures_that_are_none_are_written_without_a_size(tmp_path: Path) -> None:
    rows = [ShardRow(image=b"text", caption="a"), ShardRow(image=b"", caption=None)]
    found = read(write_shard(str(tmp_path), rows, index=0))
    assert Counter(map(outcome, found)) == {"ok": 1, "missing_caption": 1}
    assert isinstance(found[0], Sample)
    assert "width" not in found[0].metadata
