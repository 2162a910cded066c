"""Sources and tables in S3, on a real server of its protocol."""

import re
import sys
from pathlib import Path

import fsspec
import pytest
import s3fs
import synthetic_units
from layout_fixtures import LIST_LAYOUTS, ROWS, write_list
from shard_files import write_parquet_shard

from pipelines.sources import SourceError
from pipelines.sources.captions import read_captions
from pipelines.sources.links import list_links, read_links
from pipelines.sources.settings import CaptionSettings, LinkSettings, ShardSettings
from pipelines.sources.shards import ShardRow, write_shard
from pipelines.sources.webdataset import list_shards, read_shard
from pipelines.storage.objects import (
    StorageError,
    check_client,
    exists,
    list_names,
    open_object,
    read_bytes,
    write_once,
)
from pipelines.storage.retry import StoreFailure
from pipelines.tables.committer import recover
from pipelines.tables.table import open_table

FAILED = ShardRow(image=None, caption="c", status="failed_to_download", error_message="HTTP Error 404")
# Above the read-ahead, so that a shard is fetched in several pieces.
IMAGES = [ShardRow(image=bytes([index]) * 3_000_000, caption=f"c{index}") for index in range(6)]


@pytest.fixture
def new_clients(monkeypatch):
    """Clients of the store are made anew, with the environment that the test sets."""
    s3fs.S3FileSystem.clear_instance_cache()
    yield monkeypatch
    s3fs.S3FileSystem.clear_instance_cache()


def check_samples(rows, images):
    """The rows are the samples of the images, and a failed download."""
    *samples, last = rows
    assert [sample.image for sample in samples] == [row.image for row in images]
    assert last.reason == "download_failed"


def test_shards_are_written_listed_and_streamed(bucket: str) -> None:
    written = write_shard(f"{bucket}/shards", [*IMAGES, FAILED], index=0)
    assert write_shard(f"{bucket}/shards", [*IMAGES, FAILED], index=0) == written
    for path in ("", "*.tar", "00000.tar"):
        assert list_shards(f"{bucket}/shards/{path}") == [written]
    check_samples(read_shard(written, ShardSettings()), IMAGES)
    # A shard that is added later is seen, whatever was listed before.
    write_shard(f"{bucket}/shards", IMAGES[:1], index=1)
    assert [shard.name for shard in list_shards(f"{bucket}/shards")] == ["00000", "00001"]


def test_shards_and_url_lists_are_streamed(bucket: str, tmp_path: Path) -> None:
    path = write_parquet_shard(tmp_path, [*IMAGES, FAILED], rows_per_group=4)
    fsspec.filesystem("s3").put_file(str(path), f"{bucket}/parquet/00000.parquet")
    (shard,) = list_shards(f"{bucket}/parquet")
    check_samples(read_shard(shard, ShardSettings(), start=1), IMAGES[1:])
    fsspec.filesystem("s3").put_file(
        str(write_list(tmp_path, LIST_LAYOUTS[0])), f"{bucket}/lists/part-00000.parquet"
    )
    (links,) = list_links(f"{bucket}/lists/*.parquet")
    assert links.url == f"{bucket}/lists/part-00000.parquet"
    assert [row.ordinal for row in read_links(links, LinkSettings(), start=5)] == list(range(5, ROWS))


def test_caption_lists_are_read(bucket: str) -> None:
    with fsspec.open(f"{bucket}/list.txt", "wb") as file:
        file.write(b"one\ntwo\n")
    rows = list(read_captions(f"{bucket}/list.txt", CaptionSettings()))
    assert [row.text for row in rows] == ["one", "two"]


@pytest.mark.parametrize("url", ["s3://bucket/none", "s3://bucket/none.tar", "s3://no-such-bucket/none"])
def test_missing_source_is_named(bucket: str, url: str) -> None:
    with pytest.raises(SourceError, match="no shards at"):
        list_shards(url)
    with pytest.raises(SourceError, match="no such file"):
        list(read_captions(f"{url}.txt", CaptionSettings()))


def test_unreachable_store_is_named(new_clients):
    key = dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "test")
    for name, value in {"AWS_ENDPOINT_URL": "http://127.0.0.1:1", "AWS_MAX_ATTEMPTS": "1", **key}.items():
        new_clients.setenv(name, value)
    new_clients.setattr("pipelines.storage.retry.BACKOFF_SECONDS", (0.1,))
    with pytest.raises(SourceError, match="cannot be listed"):
        list_shards("s3://bucket/none")
    with pytest.raises(SourceError, match="cannot be opened"):
        list(read_captions("s3://bucket/none.txt", CaptionSettings()))


def test_table_in_a_bucket_equals_one_on_disk(bucket: str, tmp_path: Path) -> None:
    remote, local = f"{bucket}/tables/latents", str(tmp_path / "latents")
    for url in (remote, local):
        synthetic_units.run(url)
    assert synthetic_units.equal(remote, local)
    for file in open_table(local).units:
        assert read_bytes(f"{remote}/{file.unit}.parquet") == read_bytes(file.path)
    version = open_table(remote).version
    synthetic_units.run(remote)
    assert open_table(remote).version == version


def test_second_writer_of_an_object_is_refused(bucket: str) -> None:
    assert write_once(f"{bucket}/object", b"first")
    assert not write_once(f"{bucket}/object", b"second")
    assert read_bytes(f"{bucket}/object") == b"first"


def test_objects_written_since_a_listing_are_seen(bucket: str) -> None:
    write_once(f"{bucket}/listed/first", b"")
    assert list_names(f"{bucket}/listed") == ["first"]
    other = s3fs.S3FileSystem(skip_instance_cache=True)
    other.pipe_file("bucket/listed/second", b"second")
    assert exists(f"{bucket}/listed/second")
    assert read_bytes(f"{bucket}/listed/second") == b"second"
    with open_object(f"{bucket}/listed/second", ahead=1) as file:
        assert file.read() == b"second"
    other.rm_file("bucket/listed/first")
    assert not exists(f"{bucket}/listed/first")


def test_orphans_in_a_bucket_are_committed(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"{bucket}/killed/latents"
    with monkeypatch.context() as patch:
        patch.setattr("pipelines.tables.committer.commit_units", lambda *_, **__: [])
        synthetic_units.run(url)
    assert len(open_table(url).units) == 0
    assert len(recover(open_table(url)).units) == 6
    assert open_table(url).num_rows == 17


def test_missing_credentials_are_a_store_failure(bucket, new_clients, tmp_path):
    new_clients.setenv("AWS_EC2_METADATA_DISABLED", "true")
    new_clients.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        new_clients.delenv(name)
    with pytest.raises(StorageError, match=r"cannot be written: .*Unable to locate credentials"):
        write_once(f"{bucket}/object-of-nobody", b"")
    with pytest.raises(StoreFailure, match="object: NoCredentialsError"):
        open_object(f"{bucket}/object", ahead=1)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("gs://bucket/run", "gs://bucket/run: no client for gs:// is installed; pip install gcsfs"),
        ("abfs://c@account.dfs.core.windows.net/run", "abfs:// is installed; pip install adlfs"),
        ("s4://bucket/run", "s4://bucket/run: s4:// is no store"),
    ],
)
def test_missing_client_names_its_package(url: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("gcsfs", "adlfs"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(StorageError, match=re.escape(message)):
        check_client(url)


def test_urls_with_a_client_are_accepted(tmp_path: Path) -> None:
    for url in (str(tmp_path), f"file://{tmp_path}", "s3://bucket/run", "memory://run"):
        check_client(url)
