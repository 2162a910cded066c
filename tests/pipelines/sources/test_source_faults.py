"""Shards and lists from a store that answers 503, breaks connections, stalls and truncates responses."""

import io
from collections import Counter
from pathlib import Path

import fault_proxy
import fsspec
import pytest
from faulty_store import faults_in, faulty
from layout_fixtures import LIST_LAYOUTS, ROWS, write_list
from shard_files import write_parquet_shard

from pipelines.rejections import Rejection
from pipelines.sources.captions import read_captions
from pipelines.sources.links import list_links, read_links
from pipelines.sources.listing import list_files
from pipelines.sources.settings import CaptionSettings, LinkSettings, ShardSettings
from pipelines.sources.shards import ShardRow, write_shard
from pipelines.sources.webdataset import Sample, list_shards, read_shard
from pipelines.stages.blocklist import load_blocklist
from pipelines.stages.settings import Blocklists
from pipelines.storage.objects import open_object, read_bytes
from pipelines.storage.retry import StoreFailure

FAILED = ShardRow(image=None, caption="c", status="failed_to_download", error_message="HTTP Error 404")
LINES = "".join(f"caption {row}\n" for row in range(300))
JSON_LINES = "".join(f'{{"caption": "{line}"}}\n' for line in LINES.splitlines())
CAPTIONS = {"list.txt": LINES, "list.tsv": f"caption\n{LINES}", "list.jsonl": JSON_LINES}
torn = pytest.mark.parametrize("error", [None, ConnectionResetError("reset")])


def shard_rows(count: int, *, size: int) -> list[ShardRow]:
    return [ShardRow(image=bytes([index]) * size, caption=f"c{index}") for index in range(count)]


def fill(bucket: str, folder: Path) -> None:
    """Tars, one of them above the read-ahead and one cut in half; Parquet shards; lists."""
    filesystem = fsspec.filesystem("s3")
    write_shard(f"{bucket}/shards", [*shard_rows(20, size=3_000), FAILED], index=0)
    write_shard(f"{bucket}/shards", shard_rows(3, size=4_000_000), index=1)
    write_shard(f"{bucket}/shards", shard_rows(8, size=3_000), index=2)
    whole = read_bytes(f"{bucket}/shards/00002.tar")
    filesystem.pipe_file(f"{bucket}/shards/00002.tar", whole[: len(whole) // 2])
    for index in (3, 4):
        file = write_parquet_shard(
            folder, [*shard_rows(10, size=3_000), FAILED], index=index, rows_per_group=4, small_pages=True
        )
        filesystem.put_file(str(file), f"{bucket}/shards/{file.name}")
    filesystem.put_file(str(write_list(folder / "list", LIST_LAYOUTS[0])), f"{bucket}/lists/part-0.parquet")
    for name, text in CAPTIONS.items():
        filesystem.pipe_file(f"{bucket}/{name}", text.encode())
    filesystem.pipe_file(f"{bucket}/domains.txt", b"".join(b"host%d.example\n" % n for n in range(300)))


def everything(bucket: str) -> dict[str, list[object]]:
    """All rows of all sources, by source."""
    shards, lists = list_shards(f"{bucket}/shards"), list_links(f"{bucket}/lists")
    return {
        **{shard.url: [*read_shard(shard, ShardSettings())] for shard in shards},
        **{links.url: [*read_links(links, LinkSettings())] for links in lists},
        **{name: [*read_captions(f"{bucket}/{name}", CaptionSettings())] for name in CAPTIONS},
        "domains": [load_blocklist(Blocklists(domains=f"{bucket}/domains.txt"))],
    }


def test_faults_of_the_store_change_no_row(bucket: str, tmp_path: Path) -> None:
    fill(bucket, tmp_path)
    quiet = everything(bucket)
    torn = quiet[f"{bucket}/shards/00002.tar"]
    assert Counter(type(row) for row in torn) == {Sample: 4, Rejection: 4}
    assert {row.reason for row in torn if isinstance(row, Rejection)} == {"torn_shard"}
    lengths = [len(quiet[f"{bucket}/shards/{name}"]) for name in ("00000.tar", "00001.tar", "00003.parquet")]
    assert lengths == [21, 3, 11]
    assert len(quiet[f"{bucket}/lists/part-0.parquet"]) == ROWS
    names = list_files(f"{bucket}/shards", endings=(".tar",))
    log = tmp_path / "faults.jsonl"
    with faulty(log, seed=1, rate=0.5, most=10):
        while not log.exists() or sum(faults_in(log)["GET", kind] for kind in fault_proxy.KINDS) < 10:
            assert everything(bucket) == quiet
        while faults_in(log).total() < 20:
            assert list_files(f"{bucket}/shards", endings=(".tar",)) == names
    assert faults_in(log) == {(one, kind): 2 for one in ("GET", "LIST") for kind in fault_proxy.KINDS}


class TornResponses(io.BytesIO):
    """A file whose reads are cut short: by an error, or silently, as by a proxy that hides the error."""

    size = 1000

    def __init__(self, *, failures: int, error: Exception | None) -> None:
        super().__init__(bytes(index % 251 for index in range(self.size)))
        self.failures, self.error = failures, error

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        if self.failures == 0 or not data:
            return data
        self.failures -= 1
        if self.error is not None:
            raise self.error
        return data[: len(data) // 2]


def opened(monkeypatch: pytest.MonkeyPatch, file: TornResponses) -> None:
    monkeypatch.setattr("pipelines.storage.retry.BACKOFF_SECONDS", (0.0, 0.0, 0.0))
    monkeypatch.setattr(type(fsspec.filesystem("memory")), "open", lambda *_, **__: file)


@torn
def test_torn_responses_are_requested_again(error: Exception | None, monkeypatch: pytest.MonkeyPatch) -> None:
    file = TornResponses(failures=2, error=error)
    opened(monkeypatch, file)
    with open_object("memory://x", ahead=1) as reader:
        pieces = [*iter(lambda: reader.read(300), b"")]
    assert b"".join(pieces) == bytes(index % 251 for index in range(1000))
    assert file.failures == 0


@torn
def test_a_store_that_keeps_failing_raises(error: Exception | None, monkeypatch: pytest.MonkeyPatch) -> None:
    opened(monkeypatch, TornResponses(failures=99, error=error))
    with open_object("memory://x", ahead=1) as reader, pytest.raises(StoreFailure, match="memory://x: "):
        reader.read(300)
