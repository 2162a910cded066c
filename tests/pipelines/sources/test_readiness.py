"""Shards that changed lately and do not look finished wait."""

import os
import time
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shard_files import shard_rows, write_parquet_shard

from pipelines.sources.readiness import unfinished_shards
from pipelines.sources.shards import write_shard
from pipelines.sources.webdataset import list_shards


def waiting(folder: Path | str, *, settle: float = 600.0) -> list[str]:
    return [shard.name for shard in unfinished_shards(list_shards(str(folder)), settle=settle)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index in range(4):
        write_shard(str(tmp_path), shard_rows(2), index=index)
    (tmp_path / "00001_stats.json").unlink()
    torn = tmp_path / "00002.tar"
    torn.write_bytes(torn.read_bytes()[:5_000])
    (tmp_path / "00003.tar").write_bytes(b"")
    return tmp_path


def test_shards_without_stats_or_end_wait(folder: Path) -> None:
    assert waiting(folder) == ["00001", "00002", "00003"]
    assert waiting(folder, settle=0.0) == []


@pytest.mark.parametrize("age", [601, -601, 1e9, -1e9])
def test_shards_that_did_not_change_lately_are_read(folder: Path, age: float) -> None:
    for path in folder.glob("*.tar"):
        os.utime(path, (time.time() - age,) * 2)
    assert waiting(folder) == []


def test_parquet_without_its_footer_waits(tmp_path: Path) -> None:
    path = write_parquet_shard(tmp_path, shard_rows(3))
    assert waiting(tmp_path) == []
    path.write_bytes(path.read_bytes()[:-100])
    assert waiting(tmp_path) == ["00000"]


def test_a_store_says_when_shards_changed() -> None:
    store = fsspec.filesystem("memory")
    store.pipe_file("/lately/a.tar", bytes(1024))
    assert waiting("memory://lately") == ["a"]
    with store.open("/lately/a.parquet", "wb") as file:
        pq.write_table(pa.table({"key": ["a"]}), file)
    store.pipe_file("/lately/a_stats.json", b"{}")
    assert waiting("memory://lately") == []
    store.rm("/lately", recursive=True)
