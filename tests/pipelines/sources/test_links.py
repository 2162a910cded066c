import io
import math
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from layout_fixtures import BARE, BROKEN, LIST_LAYOUTS, ROWS, by_copy, by_list_layout, table_of, write_list
from shard_files import assert_ranges_agree, corrupt, most_allocated, text

from pipelines.rejections import Rejected, Rejection
from pipelines.sources import SourceError
from pipelines.sources.layouts import Layout
from pipelines.sources.links import Link, LinkList, clean_url, list_links, read_header, read_links
from pipelines.sources.parquet import ParquetRows
from pipelines.sources.settings import LinkSettings

SETTINGS = LinkSettings()


def read(links: LinkList, settings: LinkSettings = SETTINGS) -> list[Link | Rejection]:
    rows = list(read_links(links, settings))
    assert [row.ordinal for row in rows] == list(range(len(rows)))
    return rows


def outcomes(rows: list[Link | Rejection]) -> dict[str, int]:
    return dict(Counter(row.reason if isinstance(row, Rejection) else "link" for row in rows))


def write(path: Path, columns: dict[str, Any], **options: Any) -> LinkList:
    pq.write_table(pa.table(columns), path, **options)
    return list_links(str(path))[0]


# The layouts.


@by_copy
@by_list_layout
def test_every_layout_is_read(tmp_path: Path, layout: Layout, copy: bool) -> None:
    (links,) = list_links(str(write_list(tmp_path, layout, copy=copy)))
    rows = read(links)
    assert outcomes(rows) == {"link": ROWS - len(BROKEN), **dict.fromkeys(BROKEN.values(), 1)}
    assert {row.ordinal: row.reason for row in rows if isinstance(row, Rejection)} == BROKEN
    good = {row.ordinal: row for row in rows if isinstance(row, Link)}
    assert (good[0].id, good[0].url) == ("part-00000/000000000", "https://host0.example/0.jpg")
    assert good[0].caption == "a picture of number 0"
    for ordinal in BARE:
        assert good[ordinal].metadata == {}
    whole = {"URL", "url", "TEXT", "text", "caption"}
    assert good[1].metadata.keys() == layout.columns.keys() - whole
    assert not any(isinstance(value, float) and math.isnan(value) for value in good[1].metadata.values())


@by_list_layout
def test_floats_of_integer_columns_are_integers(tmp_path: Path, layout: Layout) -> None:
    (links,) = list_links(str(write_list(tmp_path, layout, copy=True)))
    row = read(links)[1]
    for name in ("WIDTH", "HEIGHT", "SAMPLE_ID", "hash", "id"):
        assert isinstance(row.metadata.get(name, 0), int)


@by_list_layout
def test_the_header_names_layout_and_columns(tmp_path: Path, layout: Layout) -> None:
    header = read_header(*list_links(str(write_list(tmp_path, layout))), SETTINGS)
    assert layout.name in header.layout.split(" or ")
    assert (header.rows, header.url_column.lower(), header.caption_column.lower()) == (ROWS, "url", "text")


def test_laion_coco_has_two_captions(tmp_path: Path) -> None:
    layout = next(layout for layout in LIST_LAYOUTS if layout.name == "laion-coco")
    (links,) = list_links(str(write_list(tmp_path, layout)))
    web, synthetic = (read(links, LinkSettings(caption_column=name))[0] for name in (None, "top_caption"))
    assert (web.caption, synthetic.caption) == ("a picture of number 0", "top_caption 0")
    assert synthetic.metadata["TEXT"] == "a picture of number 0"
    assert web.metadata["all_captions"] == ["caption 0", "another"]


# Rows.


def test_one_bad_string_costs_one_row(tmp_path: Path) -> None:
    links = write(
        tmp_path / "a.parquet",
        {
            "URL": text(b"http://a/1", b"http://a/\xff", b"http://a/3", b"http://a/4"),
            "TEXT": text(b"one", b"two", b"\xff\xfe", b"four"),
            "LICENSE": text(b"\x80", b"?", b"?", None),
            "all_captions": pa.array([["x"], ["x"], ["x"], ["x"]]),
        },
    )
    rows = read(links)
    assert outcomes(rows) == {"link": 2, "bad_url": 1, "bad_encoding": 1}
    assert rows[0].metadata == {"all_captions": ["x"]}


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://a.example/b.jpg", None),
        ("  HTTPS://A.example:8443/ü b.jpg?x=1#y ", None),
        ("http://[2001:db8::1]/a.jpg", None),
        ("http://user:word@a.example/", None),
        (None, "missing_url"),
        ("   ", "missing_url"),
        (b"http://\xff", "bad_url"),
        ("ftp://a.example/b.jpg", "bad_url"),
        ("file:///etc/passwd", "bad_url"),
        ("data:image/png;base64,AAAA", "bad_url"),
        ("javascript:alert(1)", "bad_url"),
        ("//a.example/b.jpg", "bad_url"),
        ("a.example/b.jpg", "bad_url"),
        ("http:///b.jpg", "bad_url"),
        ("http://", "bad_url"),
        ("http://[::1/b.jpg", "bad_url"),
        ("http://a.example:99999/b.jpg", "bad_url"),
        ("http://a.example:x/b.jpg", "bad_url"),
        ("http://a.example/b\r\nHost: c", "bad_url"),
        ("http://a.example/" + "b" * 9000, "bad_url"),
    ],
)
def test_urls_are_checked(url: str | bytes | None, reason: str | None) -> None:
    try:
        assert clean_url(url) == str(url).strip()
        found = None
    except Rejected as rejected:
        found = rejected.reason
    assert found == reason


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.binary(),
        pa.binary_view(),
        pa.dictionary(pa.int32(), pa.string()),
        pa.dictionary(pa.int32(), pa.binary()),
    ],
)
def test_any_text_type_is_read(tmp_path: Path, kind: pa.DataType) -> None:
    columns = {"URL": text(b"http://a/1", None, b"http://\xff"), "TEXT": text(b"x", b"y", b"z")}
    typed = (column.cast(pa.binary()) if "binary" in str(kind) else column for column in columns.values())
    typed = (
        column.dictionary_encode() if "dictionary" in str(kind) else column.cast(kind) for column in typed
    )
    links = write(tmp_path / "a.parquet", dict(zip(columns, typed, strict=True)))
    assert outcomes(read(links)) == {"link": 1, "missing_url": 1, "bad_url": 1}


def test_columns_of_one_name_must_agree(tmp_path: Path) -> None:
    urls, captions = pa.array([f"http://a/{row}" for row in range(5)]), pa.array(["a", "b", "c", "d", None])
    others = pa.array(["a", None, "x", "d", "e"])
    links = write(tmp_path / "a.parquet", {"URL": urls})
    table = pa.Table.from_arrays([urls, captions, others], names=["URL", "TEXT", "TEXT"])
    pq.write_table(table, links.url)
    rows = read(links)
    assert [row.caption if isinstance(row, Link) else row.reason for row in rows] == [
        "a", "b", "bad_metadata", "d", "bad_metadata",
    ]  # fmt: skip
    assert_ranges_agree(partial(read_links, links, SETTINGS))


def test_a_column_without_a_value_rejects_every_row(tmp_path: Path) -> None:
    links = write(tmp_path / "a.parquet", {"URL": ["http://a/1"] * 2, "TEXT": pa.nulls(2)})
    assert outcomes(read(links)) == {"missing_caption": 2}


def test_bytes_are_left_out(tmp_path: Path) -> None:
    columns = {"url": ["http://a/1"], "caption": ["x"], "jpg": [b"\xff\xd8"], "n": [1]}
    (row,) = read(write(tmp_path / "a.parquet", columns))
    assert row.metadata == {"n": 1}


# Ranges, tears, faults.


def test_ranges_are_parts_of_the_whole(tmp_path: Path) -> None:
    (links,) = list_links(str(write_list(tmp_path, LIST_LAYOUTS[0])))
    assert_ranges_agree(partial(read_links, links, SETTINGS))


def test_a_corrupt_group_costs_its_rows(tmp_path: Path) -> None:
    path = write_list(tmp_path, LIST_LAYOUTS[0])
    (links,) = list_links(str(path))
    whole = read(links)
    corrupt(path, group=1, column="URL")
    rows = read(links)
    assert rows[:5] == whole[:5]
    assert rows[10:] == whole[10:]
    assert outcomes(rows[5:10]) == {"torn_shard": 5}


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"PAR1" + b"x" * 100 + b"PAR1"])
def test_a_file_other_than_parquet_is_one_rejection(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.parquet").write_bytes(content)
    (links,) = list_links(str(tmp_path))
    (row,) = read(links)
    assert (row.id, row.reason) == ("a/.parquet", "torn_shard")
    with pytest.raises(SourceError, match="not readable as Parquet"):
        read_header(links, SETTINGS)


class Failing(io.BytesIO):
    """A file whose store is away from the n-th read on."""

    def __init__(self, data: bytes, *, after: int) -> None:
        super().__init__(data)
        self.left = after

    def read(self, size: int | None = -1, /) -> bytes:
        self.left -= 1
        if self.left < 0:
            raise TimeoutError("the store is away")
        return super().read(size)


def test_store_errors_are_not_corruption(tmp_path: Path) -> None:
    data = write_list(tmp_path, LIST_LAYOUTS[0]).read_bytes()

    def rows(after: int) -> int:
        found = list(ParquetRows(Failing(data, after=after)).batches(["URL"], batch_rows=2))
        return sum(part.record.num_rows for part in found)

    assert rows(after=100) == ROWS
    for after in range(3):
        with pytest.raises(TimeoutError, match="the store is away"):
            rows(after=after)


def test_missing_columns_are_named(tmp_path: Path) -> None:
    links = write(tmp_path / "a.parquet", {"URL": ["http://a/1"], "ALT": ["x"]})
    with pytest.raises(
        SourceError, match="caption or TEXT or text or prompt or Prompt; it has URL, ALT: set "
    ):
        read(links)
    assert outcomes(read(links, LinkSettings(caption_column="ALT"))) == {"link": 1}
    with pytest.raises(SourceError, match="no url column named SRC; it has "):
        read(links, LinkSettings(url_column="SRC", caption_column="ALT"))
    numbers = write(tmp_path / "b.parquet", {"URL": [1], "TEXT": ["x"]})
    with pytest.raises(SourceError, match="'URL' is of type int64; text is accepted"):
        read(numbers)


# Listing.


def test_files_folders_and_globs_name_lists(tmp_path: Path) -> None:
    for name in ("b", "a"):
        write(tmp_path / f"{name}.parquet", {"URL": ["http://a/1"], "TEXT": ["x"]})
    (tmp_path / ".c.parquet").write_bytes(b"being written")
    (tmp_path / "_SUCCESS").write_bytes(b"")
    for path, names in (("", ["a", "b"]), ("*.parquet", ["a", "b"]), ("b.parquet", ["b"])):
        assert [links.name for links in list_links(f"{tmp_path}/{path}")] == names
    with pytest.raises(SourceError, match="no URL lists at"):
        list_links(f"{tmp_path}/c*.parquet")


def test_lists_lie_on_any_store() -> None:
    memory = fsspec.filesystem("memory")
    with memory.open("/lists/a.parquet", "wb") as file:
        pq.write_table(table_of(LIST_LAYOUTS[0]), file)
    (links,) = list_links("memory://lists")
    assert links.url == "memory:///lists/a.parquet"
    assert outcomes(read(links))["link"] == ROWS - len(BROKEN)


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    rows = 60_000
    # Texts that do not compress, in a single row group: 60 MB of columns.
    noise = np.random.default_rng(0).integers(97, 123, size=(rows, 1000), dtype=np.uint8)
    columns = {"URL": ["http://a/1"] * rows, "TEXT": [bytes(row).decode() for row in noise]}
    pq.write_table(pa.table(columns), path, row_group_size=rows, use_dictionary=False)
    assert path.stat().st_size > 30 << 20
    del columns, noise
    count, most = most_allocated(read_links(*list_links(str(path)), SETTINGS))
    assert count == rows
    assert most < 12 << 20
