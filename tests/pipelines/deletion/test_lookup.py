"""URLs and hashes name rows of shards, by the Parquet files beside them or by the images."""

import hashlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deletion_run import id_of, image, keys_of, make_shards, url_of

from pipelines.deletion.lookup import look_up_shards
from pipelines.rejections import Rejected
from pipelines.sources.links import Link
from pipelines.sources.settings import ShardSettings
from pipelines.sources.webdataset import Sample, list_shards, read_shard
from pipelines.stages.deletion_filter import DeletionFilter, RecordedDeletionFilter
from pipelines.tables.deletion_list import DeletionList


def sha256_of(shard: int, row: int) -> str:
    return hashlib.sha256(image(100 * shard + row)).hexdigest()


def md5_of(shard: int, row: int) -> str:
    return hashlib.md5(image(100 * shard + row), usedforsecurity=False).hexdigest()


@pytest.fixture
def shards(tmp_path: Path):
    make_shards(tmp_path)
    return list_shards(str(tmp_path))


@pytest.fixture
def deletion_filter(tmp_path: Path) -> DeletionFilter:
    return DeletionFilter(DeletionList(str(tmp_path / "forgotten")))


def sample_of(shard, row: int) -> Sample:
    [found] = [one for one in read_shard(shard, ShardSettings()) if one.ordinal == row]
    return found


def check_second_row_withheld(row_filter, shard) -> None:
    """The filter withholds the second row, and not the third."""
    check = row_filter.for_shard(shard)
    check(sample_of(shard, 2), id_of(0, 2))
    with pytest.raises(Rejected, match="withheld"):
        check(sample_of(shard, 1), id_of(0, 1))
    assert row_filter.describe() == {}


def test_parquet_beside_a_tar_knows_rejected_rows(shards):
    known = keys_of(urls=[url_of(0, 3), url_of(1, 2)], hashes=[sha256_of(1, 7)])
    found = look_up_shards(shards, known | keys_of(urls=["http://nowhere.example/"]), source="web")
    assert found.ids == {id_of(0, 3), id_of(1, 2), id_of(1, 7)}
    assert (found.columns, found.read, found.skipped) == (2, 0, 0)
    assert found.entries == {*(("url", key) for key in known.urls), *(("hash", key) for key in known.hashes)}


def test_tar_alone_is_read_for_hashes_only(shards):
    for shard in shards:
        Path(shard.url.replace(".tar", ".parquet")).unlink()
    urls = [url_of(0, 1)]
    assert look_up_shards(shards, keys_of(urls=urls), source="web").skipped == 2
    found = look_up_shards(shards, keys_of(urls=urls, hashes=[md5_of(1, 7)]), source="web")
    assert (found.ids, found.read) == ({id_of(0, 1), id_of(1, 7)}, 2)


def test_images_are_read_where_keys_are_integers(shards):
    for shard in shards:
        beside = shard.url.replace(".tar", ".parquet")
        rows = pq.read_table(beside)
        keys = rows.column("key").cast(pa.int64())
        pq.write_table(rows.set_column(rows.schema.get_field_index("key"), "key", keys), beside)
    found = look_up_shards(shards, keys_of(hashes=[md5_of(1, 7)]), source="web")
    assert (found.ids, found.read) == ({id_of(1, 7)}, 2)


def test_laions_row_number_is_a_hash(shards):
    beside = shards[0].url.replace(".tar", ".parquet")
    rows = pq.read_table(beside)
    pq.write_table(rows.append_column("hash", pa.array(range(-5, 5), pa.int64())), beside)
    assert look_up_shards(shards, keys_of(hashes=[-5, 4]), source="web").ids == {id_of(0, 0), id_of(0, 9)}


@pytest.mark.parametrize(
    "keys",
    [
        keys_of(urls=["https://ORIGIN.example/0/secret-1.png#x"]),
        keys_of(hashes=[sha256_of(0, 1)]),
        keys_of(hashes=[md5_of(0, 1)]),
        keys_of(ids=[id_of(0, 1)]),
    ],
)
def test_filter_finds_a_row_by_any_key(shards, deletion_filter, keys):
    deletion_filter.for_shard(shards[0])(sample_of(shards[0], 1), id_of(0, 1))
    deletion_filter.list.add(keys)
    check_second_row_withheld(deletion_filter, shards[0])


def test_link_is_refused_before_its_download(deletion_filter):
    deletion_filter.list.add(keys_of(urls=[url_of(0, 1)], hashes=[77]))

    def link(row: int, **metadata: int) -> Link:
        return Link(id=f"list/{row}", ordinal=row, url=url_of(0, row), caption="c", metadata=metadata)

    for listed in (link(1), link(2, hash=77)):
        with pytest.raises(Rejected, match="withheld"):
            deletion_filter.check_link(listed)
    deletion_filter.check_link(link(2, hash=78))


def test_recorded_deletions_are_repeated(shards):
    check_second_row_withheld(RecordedDeletionFilter([id_of(0, 1)]), shards[0])
