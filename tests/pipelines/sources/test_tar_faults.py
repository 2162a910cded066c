"""Tars that are damaged, joined, or no tars: every row that anything counts is a sample or a rejection."""

import gzip
import io
import json
import os
import shutil
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shard_files import encoded, failed, only, outcomes, read, shard_rows, write_tar

from pipelines.sources.shards import write_shard

BLOCK = 512
MEMBERS_PER_SAMPLE = 3


def tar_of(path: Path, count: int, *, prefix: str = "", **options) -> Path:
    """A tar of `count` samples without a sidecar."""
    with tarfile.open(path, "w", **options) as archive:
        for row in range(count):
            values = {"jpg": encoded(row), "json": b"{}", "txt": f"image {row}".encode()}
            for extension, content in values.items():
                header = tarfile.TarInfo(f"{prefix}{row:04d}.{extension}")
                header.size = len(content)
                archive.addfile(header, io.BytesIO(content))
    return path


def offset_of(path: Path, sample: int) -> int:
    """Where a sample begins."""
    with tarfile.open(path) as archive:
        return archive.getmembers()[sample * MEMBERS_PER_SAMPLE].offset


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


# Ends.


def test_a_zero_filled_rest_is_a_tear(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "a.tar", 32)
    begin = offset_of(path, 16)
    overwrite(path, begin, bytes(path.stat().st_size - begin))
    assert outcomes(read(only(path))) == ["ok"] * 16 + ["torn_shard"]


@pytest.mark.parametrize("sample", [0, 16, 31])
def test_one_zeroed_header_is_a_tear(tmp_path: Path, sample: int) -> None:
    path = tar_of(tmp_path / "a.tar", 32)
    overwrite(path, offset_of(path, sample), bytes(BLOCK))
    assert outcomes(read(only(path))) == ["ok"] * sample + ["torn_shard"]


@pytest.mark.parametrize("zeros", [0, 1, 22])
def test_another_number_of_zeros_is_no_end(tmp_path: Path, zeros: int) -> None:
    path = tar_of(tmp_path / "a.tar", 2)
    with path.open("r+b") as file:
        file.truncate(offset_of(path, 1) + 3 * 2 * BLOCK + len(encoded(1)) // BLOCK * BLOCK)
        file.seek(0, io.SEEK_END)
        file.write(bytes(zeros * BLOCK))
    assert outcomes(read(only(path))) == ["ok", "ok", "torn_shard"]


@pytest.mark.parametrize("ending", ["padded", "two blocks"])
def test_joined_tars_are_all_read(tmp_path: Path, ending: str) -> None:
    parts = [tar_of(tmp_path / f"{name}.part", 3, prefix=name).read_bytes() for name in "abc"]
    if ending == "two blocks":
        parts = [part.rstrip(b"\0") for part in parts]
        parts = [part + bytes(-len(part) % BLOCK + 2 * BLOCK) for part in parts]
    (tmp_path / "s.tar").write_bytes(b"".join(parts))
    assert outcomes(read(only(tmp_path / "s.tar"))) == ["ok"] * 9


def test_data_after_the_end_is_a_tear(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "a.tar", 2)
    path.write_bytes(path.read_bytes() + b"x" * 700)
    assert outcomes(read(only(path))) == ["ok", "ok", "torn_shard"]


@pytest.mark.parametrize("body", [b"", b"0 =\n", b"5 a=b", b"6 =bc\n", b"99 a=b\n", b"x", bytes(30)])
def test_an_empty_pax_record_hides_nothing(tmp_path: Path, body: bytes) -> None:
    path = tar_of(tmp_path / "a.tar", 4)
    header = tarfile.TarInfo("pax")
    header.type, header.size = tarfile.XHDTYPE, len(body)
    data, begin = path.read_bytes(), offset_of(path, 2)
    record = header.tobuf(tarfile.USTAR_FORMAT) + body + bytes(-len(body) % BLOCK)
    path.write_bytes(data[:begin] + record + data[begin:])
    assert outcomes(read(only(path))) == (["ok"] * 2 + ["torn_shard"] if body else ["ok"] * 4)


@pytest.mark.parametrize("counted_by", ["sidecar", "stats"])
def test_rows_that_anything_counts_are_accounted_for(tmp_path: Path, counted_by: str) -> None:
    rows = [*shard_rows(6), failed("failed_to_download", "404"), failed("failed_to_resize", "no image")]
    path = Path(write_shard(str(tmp_path), rows, index=0).url)
    if counted_by == "stats":
        path.with_suffix(".parquet").unlink()
    overwrite(path, offset_of(path, 4), bytes(BLOCK))
    found = read(only(path))
    assert outcomes(found) == ["ok"] * 4 + ["torn_shard"] * 2 + ["download_failed", "resize_failed"]
    assert len({row.id for row in found}) == 8


@pytest.mark.parametrize("count", ["9", -1, 1 << 40, None, [], True])
def test_implausible_counts_are_ignored(tmp_path: Path, count: object) -> None:
    path = tar_of(tmp_path / "a.tar", 2)
    (tmp_path / "a_stats.json").write_text(json.dumps({"count": count}))
    assert outcomes(read(only(path))) == ["ok", "ok"]


def test_rows_that_only_the_stats_count(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "a.tar", 2)
    (tmp_path / "a_stats.json").write_text(json.dumps({"count": 5, "failed_to_download": 2}))
    assert outcomes(read(only(path))) == ["ok", "ok", "missing_sample", "download_failed", "download_failed"]


# Files that are no tar.


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.jpg", encoded())
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "Git LFS"),
        (b"\n<!DOCTYPE html><html><body>403 Forbidden</body></html>\n" * 40, "HTML"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "XML"),
        (b'{"error": "not found"}', "JSON"),
        (gzip.compress(bytes(10_240)), "gzip"),
        (zipped(), "ZIP"),
        (encoded(), "JPEG"),
    ],
)
@pytest.mark.parametrize("ending", [".tar", ".parquet"])
def test_a_file_of_another_kind_is_named(tmp_path: Path, content: bytes, name: str, ending: str) -> None:
    (tmp_path / f"a{ending}").write_bytes(content)
    (row,) = read(only(tmp_path))
    assert (row.id, row.reason) == (f"a/{ending}", "not_a_shard")
    assert name in row.detail


def test_a_parquet_file_named_tar(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [1]}), tmp_path / "a.tar")
    (row,) = read(only(tmp_path))
    assert (row.reason, row.detail) == ("not_a_shard", "the file is a Parquet file")


# Formats, and faults that `tarfile` does not survive.


@pytest.mark.parametrize("format_", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_are_read_in_every_format(tmp_path: Path, format_: int) -> None:
    prefix = "a-long-folder-name/" * (6 if format_ == tarfile.USTAR_FORMAT else 20)
    path = tar_of(tmp_path / "s.tar", 3, prefix=prefix, format=format_)
    rows = read(only(path))
    assert [row.id for row in rows] == [f"s/{prefix}{row:04d}" for row in range(3)]


def test_names_and_values_of_pax_are_heeded(tmp_path: Path) -> None:
    options = {"format": tarfile.PAX_FORMAT, "pax_headers": {"comment": "of the archive"}}
    path = tar_of(tmp_path / "s.tar", 2, prefix="bücher/\udcff" * 30, **options)
    assert outcomes(read(only(path))) == ["ok", "ok"]
    header = tarfile.TarInfo("a.txt")
    header.size = 3
    record = tarfile.TarInfo("pax")
    record.type, record.size = tarfile.XHDTYPE, 10
    data = record.tobuf() + b"10 size=5\n".ljust(BLOCK, b"\0") + header.tobuf() + b"hello".ljust(BLOCK, b"\0")
    path.write_bytes(data + bytes(1024))
    assert outcomes(read(only(path))) == ["missing_image"]


@pytest.mark.skipif(shutil.which("tar") is None, reason="needs GNU tar")
@pytest.mark.parametrize("format_", ["v7", "oldgnu", "gnu", "ustar", "posix"])
def test_tars_of_another_program_are_read(tmp_path: Path, format_: str) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    for name, content in {"a.jpg": encoded(), "a.txt": b"a", "b.jpg": encoded(1), "b.txt": b"b"}.items():
        (folder / name).write_bytes(content)
    with (folder / "c.jpg").open("wb") as holes:
        holes.truncate(1 << 20)
    os.link(folder / "a.jpg", folder / "d.jpg")
    command = (
        f"tar --format={format_} {'' if format_ in ('v7', 'ustar') else '--sparse'} --sort=name -C files"
    )
    os.system(f"cd {tmp_path} && {command} -cf s.tar .")
    reasons = outcomes(read(only(tmp_path / "s.tar")))
    sparse = "missing_caption" if format_ in ("v7", "ustar") else "not_a_file"
    assert reasons == ["ok", "ok", sparse, "not_a_file"]


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_a_long_chain_of_headers_is_a_tear(tmp_path: Path, kind: bytes) -> None:
    path = tar_of(tmp_path / "a.tar", 2)
    header = tarfile.TarInfo("x")
    header.type, header.size = kind, 8
    begin = offset_of(path, 1)
    chain = (header.tobuf() + b"8 a=bcd\n".ljust(BLOCK, b"\0")) * 5_000
    data = path.read_bytes()
    path.write_bytes(data[:begin] + chain + data[begin:])
    assert outcomes(read(only(path))) == ["ok", "torn_shard"]


def test_members_of_one_sample_are_bounded(tmp_path: Path) -> None:
    members = [("a.jpg", encoded()), *((f"a.{number}", b"") for number in range(2_000)), ("a.txt", b"a")]
    shard = write_tar(tmp_path / "a.tar", [*members, ("b.jpg", encoded()), ("b.txt", b"b")])
    assert outcomes(read(shard)) == ["too_many_members", "ok"]
