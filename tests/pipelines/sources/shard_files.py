"""Shards for tests: rows, tars of any members, and img2dataset's Parquet output; and how they are read."""

import io
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.rejections import Rejection
from pipelines.sources.settings import ShardSettings
from pipelines.sources.shards import ShardRow, write_shard
from pipelines.sources.webdataset import Sample, Shard, list_shards, read_shard

Rows = list[Sample | Rejection]


def encoded(shade: int = 0, *, kind: str = "JPEG") -> bytes:
    """An image of 40 x 30 pixels."""
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), (shade % 256, 80, 160)).save(buffer, kind)
    return buffer.getvalue()


def shard_rows(count: int, *, kind: str = "JPEG") -> list[ShardRow]:
    """Rows of images, with one column of metadata."""
    metadata = ({"similarity": row / 10} for row in range(count))
    return [
        ShardRow(image=encoded(n, kind=kind), caption=f"image {n}", metadata=one, url=f"http://here/{n}.jpg")
        for n, one in enumerate(metadata)
    ]


def failed(status: str, message: str) -> ShardRow:
    """A row that img2dataset could not fetch or resize."""
    metadata = {"similarity": None}
    return ShardRow(image=None, caption="a", metadata=metadata, status=status, error_message=message)


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Shard:
    """A tar of any members, well-formed or not, without a sidecar."""
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
    return only(path)


def write_parquet_shard(
    folder: Path,
    rows: Sequence[ShardRow],
    *,
    index: int = 0,
    extension: str = "jpg",
    types: Mapping[str, pa.DataType] | None = None,
    rows_per_group: int = 100,
    small_pages: bool = False,
) -> Path:
    """The shard as img2dataset 1.47 writes it with `output_format=parquet`; `types` are those of metadata."""
    with tempfile.TemporaryDirectory() as sidecar:
        write_shard(sidecar, rows, index=index)
        table = pq.read_table(f"{sidecar}/{index:05d}.parquet")
    for name, kind in (types or {}).items():
        values = pa.array([row.metadata[name] for row in rows], kind)
        table = table.set_column(table.schema.get_field_index(name), name, values)
    table = table.append_column(extension, pa.array([row.image for row in rows], pa.binary()))
    path = folder / f"{index:05d}.parquet"
    # By default Arrow writes the images of a row group into one page.
    pages = {"use_dictionary": False, "write_batch_size": 2} if small_pages else {}
    pq.write_table(table, path, row_group_size=rows_per_group, **pages)
    return path


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


def text(*values: bytes | None) -> pa.Array:
    """A column of strings that need not be UTF-8."""
    data = pa.array(values, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(data), data.buffers())


def only(path: Path) -> Shard:
    """The one shard at a path."""
    (shard,) = list_shards(str(path))
    return shard


def read(shard: Shard, settings: ShardSettings = ShardSettings()) -> Rows:  # noqa: B008 - frozen
    """All rows, whose ordinals are consecutive."""
    rows = list(read_shard(shard, settings))
    assert [row.ordinal for row in rows] == list(range(len(rows)))
    return rows


def outcomes(rows: Rows) -> list[str]:
    """The reason of each rejection, and "ok" of each sample."""
    return [row.reason if isinstance(row, Rejection) else "ok" for row in rows]


def assert_ranges_agree(read_rows: Callable[..., Iterable[object]]) -> None:
    """Every range of a source is that part of the whole, and its bounds are checked."""
    whole = list(read_rows())
    for start in range(len(whole) + 2):
        for stop in [*range(start, len(whole) + 3), None]:
            assert list(read_rows(start=start, stop=stop)) == whole[start:stop]
    with pytest.raises(ValueError, match="start 3 and stop 2"):
        list(read_rows(start=3, stop=2))


def most_allocated(rows: Iterable[object]) -> tuple[int, int]:
    """The number of rows, and the most bytes that Arrow held after one of them."""
    pool = pa.default_memory_pool()
    before = pool.bytes_allocated()
    allocated = [pool.bytes_allocated() - before for _ in rows]
    return len(allocated), max(allocated)
