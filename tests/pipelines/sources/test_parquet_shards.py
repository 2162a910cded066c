"""img2dataset's Parquet output is read as its tars are."""

import io
from collections import Counter
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from layout_fixtures import LIST_LAYOUTS
from picture_files import write_pictures
from PIL import Image

from pipelines.rejections import Rejection
from pipelines.sources import SourceError
from pipelines.sources.settings import ShardSettings
from pipelines.sources.shards import ShardRow, write_shard
from pipelines.sources.webdataset import Sample, Shard, count_rows, list_shards, read_shard

SETTINGS = ShardSettings()


def encoded(shade: int = 0, *, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), (shade % 256, 80, 160)).save(buffer, kind)
    return buffer.getvalue()


def pictures(count: int, *, kind: str = "JPEG") -> list[ShardRow]:
    return [
        ShardRow(
            image=encoded(i, kind=kind),
            caption=f"picture {i}",
            metadata={"similarity": i / 10},
            url=f"http://here/{i}.jpg",
        )
        for i in range(count)
    ]


def failed(status: str, message: str) -> ShardRow:
    return ShardRow(
        image=None, caption="a", metadata={"similarity": None}, status=status, error_message=message
    )


def only(folder: Path) -> Shard:
    (shard,) = list_shards(str(folder))
    return shard


def read(shard: Shard, settings: ShardSettings = SETTINGS) -> list[Sample | Rejection]:
    rows = list(read_shard(shard, settings))
    assert [row.ordinal for row in rows] == list(range(len(rows)))
    return rows


def outcomes(rows: list[Sample | Rejection]) -> list[str]:
    return [row.reason if isinstance(row, Rejection) else "ok" for row in rows]


@pytest.mark.parametrize(("extension", "kind"), [("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP")])
def test_a_parquet_shard_holds_the_samples_of_the_tar(tmp_path: Path, extension: str, kind: str) -> None:
    rows = pictures(5, kind=kind)
    tar = write_shard(str(tmp_path / "tar"), rows, index=3, extension=extension)
    (tmp_path / "parquet").mkdir()
    write_pictures(tmp_path / "parquet", rows, index=3, extension=extension)
    shard = only(tmp_path / "parquet")
    assert (shard.name, count_rows(shard)) == ("00003", 5)
    assert read(shard) == read(tar)


def test_failed_rows_stand_in_their_places(tmp_path: Path) -> None:
    rows = pictures(5)
    rows[1] = failed("failed_to_download", "HTTP Error 404: File not found")
    rows[3] = failed("failed_to_resize", "Image decoding error")
    write_pictures(tmp_path, rows)
    found = read(only(tmp_path))
    assert outcomes(found) == ["ok", "download_failed", "ok", "resize_failed", "ok"]
    assert isinstance(found[1], Rejection)
    assert (found[1].id, found[1].source) == ("00000/000000001", "00000")
    assert found[1].detail == "HTTP Error 404: File not found"


def test_any_range_is_that_part_of_the_whole(tmp_path: Path) -> None:
    rows = pictures(11)
    rows[4] = failed("failed_to_download", "gone")
    path = write_pictures(tmp_path, rows, rows_per_group=4)
    table = pq.read_table(path)
    keys = table.column("key").to_pylist()
    # The same key in another row group: found however the range begins.
    keys[9] = keys[1]
    table = table.set_column(table.schema.get_field_index("key"), "key", pa.array(keys))
    pq.write_table(table, path, row_group_size=4)
    shard = only(tmp_path)
    whole = read(shard)
    assert outcomes(whole)[9] == "duplicate_key"
    for start in range(13):
        for stop in [*range(start, 14), None]:
            assert list(read_shard(shard, SETTINGS, start=start, stop=stop)) == whole[start:stop]


def corrupt(path: Path, *, group: int, column: str, skip: int = 0) -> None:
    """Overwrite the pages of a column of a row group, from `skip` bytes on."""
    metadata = pq.ParquetFile(path).metadata.row_group(group)
    chunks = (metadata.column(number) for number in range(metadata.num_columns))
    chunk = next(chunk for chunk in chunks if chunk.path_in_schema == column)
    begin = chunk.dictionary_page_offset or chunk.data_page_offset
    data = bytearray(path.read_bytes())
    end = begin + chunk.total_compressed_size
    data[begin + skip : end] = b"\xa5" * (end - begin - skip)
    path.write_bytes(data)


@pytest.mark.parametrize("column", ["jpg", "caption"])
def test_a_corrupt_row_group_costs_its_own_rows_which_keep_their_names(tmp_path: Path, column: str) -> None:
    path = write_pictures(tmp_path, pictures(10), rows_per_group=4)
    shard = only(tmp_path)
    whole = read(shard)
    corrupt(path, group=1, column=column)
    rows = read(shard)
    assert rows[:4] == whole[:4]
    assert outcomes(rows[4:8]) == ["torn_shard"] * 4
    assert rows[8:] == whole[8:]
    assert [row.id for row in rows] == [row.id for row in whole]


def test_where_keys_are_lost_rows_are_named_by_their_places(tmp_path: Path) -> None:
    path = write_pictures(tmp_path, pictures(6), rows_per_group=3)
    corrupt(path, group=0, column="key")
    rows = read(only(tmp_path))
    assert outcomes(rows) == ["torn_shard"] * 3 + ["ok"] * 3
    assert [row.id for row in rows[:3]] == ["00000/000000000", "00000/000000001", "00000/000000002"]


def test_pages_before_a_corrupt_one_are_read(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).bytes
    rows = [
        ShardRow(image=encoded(i) + noise(200_000), caption=f"picture {i}", url=f"http://here/{i}")
        for i in range(24)
    ]
    path = write_pictures(tmp_path, rows, small_pages=True)
    shard = only(tmp_path)
    whole = read(shard)
    corrupt(path, group=0, column="jpg", skip=4_000_000)
    found = read(shard)
    kept = outcomes(found).count("ok")
    assert 0 < kept < 24
    assert found[:kept] == whole[:kept]
    assert outcomes(found[kept:]) == ["torn_shard"] * (24 - kept)


@pytest.mark.parametrize("content", [b"", b"PAR1PAR1", b"<html>" * 100])
def test_a_damaged_file_is_listed_and_is_one_rejection(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "00000.parquet"
    path.write_bytes(content)
    shard = only(tmp_path)
    (row,) = read(shard)
    assert isinstance(row, Rejection)
    assert (row.id, row.reason) == ("00000/.parquet", "torn_shard")
    assert count_rows(shard) is None


def test_a_file_cut_short_has_lost_its_footer(tmp_path: Path) -> None:
    path = write_pictures(tmp_path, pictures(3))
    path.write_bytes(path.read_bytes()[:-100])
    assert outcomes(read(only(tmp_path))) == ["torn_shard"]


def test_a_tar_s_sidecar_and_a_url_list_are_no_shards(tmp_path: Path) -> None:
    write_shard(str(tmp_path), pictures(2), index=0)
    write_pictures(tmp_path, pictures(2), index=1)
    table = pa.table({"URL": ["http://a/1"], "TEXT": ["x"]})
    pq.write_table(table, tmp_path / "input_urls.parquet")
    assert [shard.url.rpartition("/")[2] for shard in list_shards(str(tmp_path))] == [
        "00000.tar",
        "00001.parquet",
    ]
    # A glob that matches sidecars alone finds them out too.
    assert [shard.name for shard in list_shards(f"{tmp_path}/*.parquet")] == ["00001"]
    with pytest.raises(SourceError, match="1 Parquet files there have no images"):
        list_shards(f"{tmp_path}/input_urls.parquet")


def test_a_picture_column_of_text_is_none(tmp_path: Path) -> None:
    pq.write_table(pa.table({"key": ["0"], "jpg": ["http://a/1"]}), tmp_path / "00000.parquet")
    with pytest.raises(SourceError, match="have no images"):
        list_shards(str(tmp_path))


def change(path: Path, **columns: pa.Array) -> None:
    table = pq.read_table(path)
    for name, values in columns.items():
        place = table.schema.get_field_index(name)
        table = table.append_column(name, values) if place < 0 else table.set_column(place, name, values)
    pq.write_table(table, path)


def text(*values: bytes | None) -> pa.Array:
    data = pa.array(values, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(data), data.buffers())


def test_what_is_odd_about_a_row_is_told_by_the_tar_s_reasons(tmp_path: Path) -> None:
    path = write_pictures(tmp_path, pictures(6))
    images = pq.read_table(path).column("jpg").to_pylist()
    images[0], images[1] = None, b"x" * 5000
    change(
        path,
        jpg=pa.array(images, pa.binary()),
        caption=text(b"a", b"b", b"\xff", None, b"  ", b"f"),
        key=pa.array(["k0", "k1", "k2", "k3", "k4", None]),
        exif=text(b"{}", b"{}", b"{}", b"{}", b"{}", b"\xff"),
    )
    rows = read(only(tmp_path), ShardSettings(max_image_bytes=4000))
    assert outcomes(rows) == [
        "missing_image",
        "oversized_member",
        "bad_encoding",
        "missing_caption",
        "empty_caption",
        "ok",
    ]
    last = rows[5]
    assert isinstance(last, Sample)
    assert last.id == "00000/000000005"
    assert "exif" not in last.metadata


def test_a_column_txt_counts_before_the_caption(tmp_path: Path) -> None:
    path = write_pictures(tmp_path, pictures(2))
    change(path, txt=pa.array(["from txt", None]))
    rows = read(only(tmp_path))
    assert [row.caption for row in rows if isinstance(row, Sample)] == ["from txt", "picture 1"]


@pytest.mark.parametrize("layout", LIST_LAYOUTS, ids=lambda layout: layout.name)
def test_additional_columns_of_every_layout_become_metadata(tmp_path: Path, layout: Any) -> None:
    """Rows in 3, rows out 3; the second has nulls, and NaN where the column is a float."""
    types = {
        name: kinds[-1]
        for name, kinds in layout.columns.items()
        if name not in ("URL", "TEXT", "url", "text", "width", "height")
    }
    values: dict[str, list[Any]] = {}
    for name, kind in types.items():
        if pa.types.is_list(kind):
            values[name] = [[], None, []]
        elif pa.types.is_string(kind):
            values[name] = ["a", None, "c"]
        else:
            values[name] = [1, float("nan") if pa.types.is_floating(kind) else None, 3]
    rows = [
        ShardRow(image=encoded(i), caption="x", metadata={name: column[i] for name, column in values.items()})
        for i in range(3)
    ]
    write_pictures(tmp_path, rows, types=types)
    found = read(only(tmp_path))
    assert Counter(outcomes(found)) == {"ok": 3}
    metadata = [row.metadata for row in found if isinstance(row, Sample)]
    assert set(types) <= metadata[0].keys()
    assert not set(types) & metadata[1].keys()


def test_shards_lie_on_any_store(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/shards/00000.parquet", write_pictures(tmp_path, pictures(3)).read_bytes())
    (shard,) = list_shards("memory://shards")
    assert outcomes(read(shard)) == ["ok"] * 3


@pytest.mark.parametrize(("rows_per_group", "small_pages"), [(10, False), (150, True)])
def test_memory_does_not_grow_with_the_shard(tmp_path: Path, rows_per_group: int, small_pages: bool) -> None:
    noise = np.random.default_rng(0).bytes
    rows = [ShardRow(image=noise(400_000), caption="x", url=f"http://here/{i}") for i in range(150)]
    path = write_pictures(tmp_path, rows, rows_per_group=rows_per_group, small_pages=small_pages)
    assert path.stat().st_size > 50 << 20
    del rows
    pool = pa.default_memory_pool()
    before = pool.bytes_allocated()
    held = [pool.bytes_allocated() - before for _ in read_shard(only(tmp_path), SETTINGS)]
    assert len(held) == 150
    assert max(held) < 16 << 20
