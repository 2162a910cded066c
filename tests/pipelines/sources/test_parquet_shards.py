"""img2dataset's Parquet output is read as its tars are."""

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from layout_fixtures import by_list_layout
from shard_files import (
    assert_ranges_agree,
    corrupt,
    encoded,
    failed,
    most_allocated,
    only,
    outcomes,
    read,
    shard_rows,
    text,
    write_parquet_shard,
)

from pipelines.sources import SourceError
from pipelines.sources.layouts import SPELLINGS
from pipelines.sources.settings import ShardSettings
from pipelines.sources.shards import ShardRow, write_shard
from pipelines.sources.webdataset import Sample, count_rows, list_shards, read_shard


@pytest.mark.parametrize(("extension", "kind"), [("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP")])
def test_parquet_holds_the_samples_of_the_tar(tmp_path: Path, extension: str, kind: str) -> None:
    rows = shard_rows(5, kind=kind)
    tar = write_shard(str(tmp_path / "tar"), rows, index=3, extension=extension)
    (tmp_path / "parquet").mkdir()
    write_parquet_shard(tmp_path / "parquet", rows, index=3, extension=extension)
    shard = only(tmp_path / "parquet")
    assert (shard.name, count_rows(shard)) == ("00003", 5)
    assert read(shard) == read(tar)


def test_failed_rows_keep_their_positions(tmp_path: Path) -> None:
    rows = shard_rows(5)
    rows[1] = failed("failed_to_download", "HTTP Error 404: File not found")
    rows[3] = failed("failed_to_resize", "Image decoding error")
    write_parquet_shard(tmp_path, rows)
    found = read(only(tmp_path))
    assert outcomes(found) == ["ok", "download_failed", "ok", "resize_failed", "ok"]
    assert (found[1].id, found[1].source) == ("00000/000000001", "00000")
    assert found[1].detail == "HTTP Error 404: File not found"


def test_ranges_are_parts_of_the_whole(tmp_path: Path) -> None:
    rows = shard_rows(11)
    rows[4] = failed("failed_to_download", "gone")
    path = write_parquet_shard(tmp_path, rows, rows_per_group=4)
    # The same key in another row group is noticed wherever the range begins.
    keys = pq.read_table(path).column("key").to_pylist()
    keys[9] = keys[1]
    change(path, key=pa.array(keys), rows_per_group=4)
    shard = only(tmp_path)
    assert outcomes(read(shard))[9] == "duplicate_key"
    assert_ranges_agree(partial(read_shard, shard, ShardSettings()))


@pytest.mark.parametrize("column", ["jpg", "caption"])
def test_a_corrupt_group_costs_its_rows(tmp_path: Path, column: str) -> None:
    path = write_parquet_shard(tmp_path, shard_rows(10), rows_per_group=4)
    shard = only(tmp_path)
    whole = read(shard)
    corrupt(path, group=1, column=column)
    rows = read(shard)
    assert rows[:4] == whole[:4]
    assert outcomes(rows[4:8]) == ["torn_shard"] * 4
    assert rows[8:] == whole[8:]
    assert [row.id for row in rows] == [row.id for row in whole]


def test_ordinals_replace_lost_keys(tmp_path: Path) -> None:
    corrupt(write_parquet_shard(tmp_path, shard_rows(6), rows_per_group=3), group=0, column="key")
    rows = read(only(tmp_path))
    assert outcomes(rows) == ["torn_shard"] * 3 + ["ok"] * 3
    assert [row.id for row in rows[:3]] == ["00000/000000000", "00000/000000001", "00000/000000002"]


def test_pages_before_a_corrupt_one_are_read(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).bytes
    rows = [
        ShardRow(image=encoded(i) + noise(200_000), caption=f"image {i}", url=f"http://here/{i}")
        for i in range(24)
    ]
    path = write_parquet_shard(tmp_path, rows, small_pages=True)
    shard = only(tmp_path)
    whole = read(shard)
    corrupt(path, group=0, column="jpg", skip=4_000_000)
    found = read(shard)
    num_read = outcomes(found).count("ok")
    assert 0 < num_read < 24
    assert found[:num_read] == whole[:num_read]
    assert outcomes(found[num_read:]) == ["torn_shard"] * (24 - num_read)


def test_a_truncated_file_is_one_rejection(tmp_path: Path) -> None:
    path = write_parquet_shard(tmp_path, shard_rows(3))
    path.write_bytes(path.read_bytes()[:-100])
    assert outcomes(read(only(tmp_path))) == ["torn_shard"]


def test_sidecars_and_url_lists_are_no_shards(tmp_path: Path) -> None:
    write_shard(str(tmp_path), shard_rows(2), index=0)
    write_parquet_shard(tmp_path, shard_rows(2), index=1)
    pq.write_table(pa.table({"URL": ["http://a/1"], "TEXT": ["x"]}), tmp_path / "input_urls.parquet")
    files = [shard.url.rpartition("/")[2] for shard in list_shards(str(tmp_path))]
    assert files == ["00000.tar", "00001.parquet"]
    # Sidecars are recognized by their columns where a glob leaves the tars out.
    assert [shard.name for shard in list_shards(f"{tmp_path}/*.parquet")] == ["00001"]
    with pytest.raises(SourceError, match="1 Parquet files there have no images"):
        list_shards(f"{tmp_path}/input_urls.parquet")


def test_an_image_column_of_text_is_none(tmp_path: Path) -> None:
    pq.write_table(pa.table({"key": ["0"], "jpg": ["http://a/1"]}), tmp_path / "00000.parquet")
    with pytest.raises(SourceError, match="have no images"):
        list_shards(str(tmp_path))


def change(path: Path, *, rows_per_group: int = 100, **columns: pa.Array) -> None:
    table = pq.read_table(path)
    for name, values in columns.items():
        index = table.schema.get_field_index(name)
        table = table.append_column(name, values) if index < 0 else table.set_column(index, name, values)
    pq.write_table(table, path, row_group_size=rows_per_group)


def test_rows_are_rejected_as_in_tars(tmp_path: Path) -> None:
    path = write_parquet_shard(tmp_path, shard_rows(6))
    images = pq.read_table(path).column("jpg").to_pylist()
    images[0], images[1] = None, b"x" * 5000
    change(
        path,
        jpg=pa.array(images, pa.binary()),
        caption=text(b"a", b"b", b"\xff", None, b"  ", b"f"),
        key=pa.array(["k0", "k1", "k2", "k3", "k4", None]),
        exif=text(b"{}", b"{}", b"{}", b"{}", b"{}", b"\xff"),
    )
    *rows, last = read(only(tmp_path), ShardSettings(max_image_bytes=4000))
    reasons = "missing_image oversized_member bad_encoding missing_caption empty_caption"
    assert outcomes(rows) == reasons.split()
    assert last.id == "00000/000000005"
    assert "exif" not in last.metadata


@pytest.mark.parametrize(
    "kind", [pa.large_binary(), pa.binary_view(), pa.dictionary(pa.int32(), pa.binary())]
)
def test_images_of_any_type_are_read(tmp_path: Path, kind: pa.DataType) -> None:
    path = write_parquet_shard(tmp_path, shard_rows(3))
    whole = read(only(tmp_path))
    images = pq.read_table(path).column("jpg").combine_chunks()
    change(path, jpg=images.dictionary_encode() if pa.types.is_dictionary(kind) else images.cast(kind))
    assert read(only(tmp_path)) == whole


def test_columns_of_one_name_must_agree(tmp_path: Path) -> None:
    path = write_parquet_shard(tmp_path, shard_rows(10))
    table = pq.read_table(path)
    similarity = pa.array([*table.column("similarity").to_pylist()[:8], 9.0, None])
    pq.write_table(
        table.append_column("similarity", similarity).append_column("jpg", table.column("jpg")), path
    )
    rows = read(only(tmp_path))
    assert outcomes(rows) == ["ok"] * 8 + ["bad_metadata", "ok"]
    assert rows[8].id == "00000/000000008"


@pytest.mark.parametrize("column", ["image", "jpg"])
@pytest.mark.parametrize("caption", SPELLINGS["caption"])
def test_hugging_face_images_are_read(tmp_path: Path, column: str, caption: str) -> None:
    images = [{"bytes": encoded(0), "path": "0.jpg"}, {"bytes": None, "path": "1.jpg"}, None]
    plain = [image and image["bytes"] for image in images]
    for values in (images, plain):
        table = pa.table({caption: ["zero", "one", "two"], column: values})
        pq.write_table(table, tmp_path / "train-00000-of-00001.parquet")
        first, *others = read(only(tmp_path))
        assert isinstance(first, Sample)
        assert (first.image, first.caption) == (encoded(0), "zero")
        assert outcomes(others) == ["missing_image", "missing_image"]


@pytest.mark.parametrize("caption", SPELLINGS["caption"])
def test_captions_of_img2dataset_have_any_name(tmp_path: Path, caption: str) -> None:
    path = write_parquet_shard(tmp_path, shard_rows(2))
    table = pq.read_table(path)
    pq.write_table(
        table.rename_columns([caption if name == "caption" else name for name in table.column_names]), path
    )
    assert [row.caption for row in read(only(tmp_path))] == ["image 0", "image 1"]


def test_the_txt_column_precedes_the_caption(tmp_path: Path) -> None:
    change(write_parquet_shard(tmp_path, shard_rows(2)), txt=pa.array(["from txt", None]))
    assert [row.caption for row in read(only(tmp_path))] == ["from txt", "image 1"]


@by_list_layout
def test_columns_of_every_layout_become_metadata(tmp_path: Path, layout: Any) -> None:
    """The second of three rows has nulls, and NaN where the column is a float."""
    own = ("URL", "TEXT", "url", "text", "width", "height")
    types = {name: kinds[-1] for name, kinds in layout.columns.items() if name not in own}

    def value(kind: pa.DataType, row: int) -> Any:
        if row == 1:
            return float("nan") if pa.types.is_floating(kind) else None
        return [] if pa.types.is_list(kind) else "a" if pa.types.is_string(kind) else 3

    metadata = [{name: value(kind, row) for name, kind in types.items()} for row in range(3)]
    rows = [ShardRow(image=encoded(i), caption="x", metadata=given) for i, given in enumerate(metadata)]
    write_parquet_shard(tmp_path, rows, types=types)
    found = read(only(tmp_path))
    assert Counter(outcomes(found)) == {"ok": 3}
    metadata = [row.metadata for row in found]
    assert set(types) <= metadata[0].keys()
    assert not set(types) & metadata[1].keys()


def test_shards_lie_on_any_store(tmp_path: Path) -> None:
    content = write_parquet_shard(tmp_path, shard_rows(3)).read_bytes()
    fsspec.filesystem("memory").pipe_file("/shards/00000.parquet", content)
    (shard,) = list_shards("memory://shards")
    assert outcomes(read(shard)) == ["ok"] * 3


@pytest.mark.parametrize(("rows_per_group", "small_pages"), [(10, False), (150, True)])
def test_memory_does_not_grow_with_the_shard(tmp_path: Path, rows_per_group: int, small_pages: bool) -> None:
    noise = np.random.default_rng(0).bytes
    rows = [ShardRow(image=noise(400_000), caption="x", url=f"http://here/{i}") for i in range(150)]
    path = write_parquet_shard(tmp_path, rows, rows_per_group=rows_per_group, small_pages=small_pages)
    assert path.stat().st_size > 50 << 20
    del rows
    count, most = most_allocated(read_shard(only(tmp_path), ShardSettings()))
    assert count == 150
    assert most < 16 << 20
