"""Sources in S3, spoken to a real server of its protocol."""

from collections.abc import Iterator

import fsspec
import pytest
import s3fs
from moto.server import ThreadedMotoServer

from pipelines.rejection import Rejection
from pipelines.sources import SourceError
from pipelines.sources.captions import Caption, CaptionSettings, read_captions
from pipelines.sources.shards import Picture, write_shard
from pipelines.sources.webdataset import Sample, ShardSettings, list_shards, read_shard

FAILED = Picture(image=None, caption="c", status="failed_to_download", error_message="HTTP Error 404")


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        s3fs.S3FileSystem.clear_instance_cache()
        fsspec.filesystem("s3").mkdir("s3://bucket")
        yield "s3://bucket"
        s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def test_shards_are_written_listed_and_streamed(bucket: str) -> None:
    # Above the read-ahead, so that the tar is fetched in several pieces.
    pictures = [Picture(image=bytes([index]) * 3_000_000, caption=f"c{index}") for index in range(6)]
    written = write_shard(f"{bucket}/shards", [*pictures, FAILED], index=0)
    assert write_shard(f"{bucket}/shards", [*pictures, FAILED], index=0) == written
    assert list_shards(f"{bucket}/shards/") == [written]
    assert list_shards(f"{bucket}/shards/*.tar") == [written]
    assert list_shards(f"{bucket}/shards/00000.tar") == [written]
    *samples, last = read_shard(written, ShardSettings())
    assert [sample.image for sample in samples if isinstance(sample, Sample)] == [p.image for p in pictures]
    assert isinstance(last, Rejection)
    assert last.reason == "download_failed"
    # A shard that is added later is seen, whatever was listed before.
    write_shard(f"{bucket}/shards", pictures[:1], index=1)
    assert [shard.name for shard in list_shards(f"{bucket}/shards")] == ["00000", "00001"]


def test_caption_lists_are_read(bucket: str) -> None:
    with fsspec.open(f"{bucket}/list.txt", "wb") as file:
        file.write(b"one\ntwo\n")
    rows = list(read_captions(f"{bucket}/list.txt", CaptionSettings()))
    assert [row.text for row in rows if isinstance(row, Caption)] == ["one", "two"]


@pytest.mark.parametrize("place", ["s3://bucket/none", "s3://bucket/none.tar", "s3://no-such-bucket/none"])
def test_nothing_there_is_an_error_that_says_so(bucket: str, place: str) -> None:
    with pytest.raises(SourceError, match="no shards at"):
        list_shards(place)
    with pytest.raises(SourceError, match="no such file"):
        list(read_captions(f"{place}.txt", CaptionSettings()))


def test_a_store_that_lets_nobody_in_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        with pytest.raises(SourceError, match="cannot be listed"):
            list_shards("s3://bucket/none")
        with pytest.raises(SourceError, match="cannot be opened"):
            list(read_captions("s3://bucket/none.txt", CaptionSettings()))
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
