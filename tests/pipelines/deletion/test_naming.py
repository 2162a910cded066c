"""Addresses and hashes name rows of shards, by the Parquet files beside them or by the pictures."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from forgetful_run import id_of, make_shards, picture, url_of

from pipelines.deletion.lookup import look_up_shards
from pipelines.rejections import Rejected
from pipelines.sources.links import Link
from pipelines.sources.settings import ShardSettings
from pipelines.sources.webdataset import Sample, list_shards, read_shard
from pipelines.stages.deletion_filter import DeletionFilter, RecordedDeletionFilter
from pipelines.tables.deletion_list import DeletionKeys, DeletionList, normalize_url, sha256_key


def asking(*, urls=(), hashes=()) -> DeletionKeys:
    return DeletionKeys(
        urls=frozenset(sha256_key(normalize_url(url)) for url in urls),
        hashes=frozenset(sha256_key(str(value)) for value in hashes),
    )


def sha256_of(shard: int, row: int) -> str:
    return hashlib.sha256(picture(100 * shard + row)).hexdigest()


def md5_of(shard: int, row: int) -> str:
    return hashlib.md5(picture(100 * shard + row), usedforsecurity=False).hexdigest()


@pytest.fixture
def shards(tmp_path: Path):
    make_shards(tmp_path)
    return list_shards(str(tmp_path))


def test_the_file_beside_a_tar_knows_rejected_rows_too(shards):
    wanted = asking(urls=[url_of(0, 3), url_of(1, 2), "http://nowhere.example/"], hashes=[sha256_of(1, 7)])
    found = look_up_shards(shards, wanted, source="web")
    assert found.ids == {id_of(0, 3), id_of(1, 2), id_of(1, 7)}
    assert (found.columns, found.read, found.skipped) == (2, 0, 0)
    assert wanted - DeletionKeys(
        urls=frozenset(key for kind, key in found.entries if kind == "url"),
        hashes=frozenset(key for kind, key in found.entries if kind == "hash"),
    ) == asking(urls=["http://nowhere.example/"])


def test_a_tar_alone_is_read_through_for_hashes_and_not_for_addresses(shards):
    for shard in shards:
        Path(shard.url.replace(".tar", ".parquet")).unlink()
    assert look_up_shards(shards, asking(urls=[url_of(0, 1)]), source="web").skipped == 2
    found = look_up_shards(shards, asking(urls=[url_of(0, 1)], hashes=[md5_of(1, 7)]), source="web")
    assert found.ids == {id_of(0, 1), id_of(1, 7)}
    assert found.read == 2


def test_the_number_that_laion_gives_a_row_is_a_hash(shards):
    beside = shards[0].url.replace(".tar", ".parquet")
    rows = pq.read_table(beside)
    rows = rows.append_column("hash", pa.array(range(-5, 5), pa.int64()))
    pq.write_table(rows, beside)
    assert look_up_shards(shards, asking(hashes=[-5, 4]), source="web").ids == {id_of(0, 0), id_of(0, 9)}


def sample_of(shard, row: int) -> Sample:
    [found] = [one for one in read_shard(shard, ShardSettings()) if one.ordinal == row]
    return found


@pytest.mark.parametrize(
    "wanted",
    [
        asking(urls=["https://ORIGIN.example/0/secret-1.png#x"]),
        asking(hashes=[sha256_of(0, 1)]),
        asking(hashes=[md5_of(0, 1)]),
        DeletionKeys(ids=frozenset([sha256_key(id_of(0, 1))])),
    ],
)
def test_a_veto_knows_a_row_by_every_name(shards, tmp_path, wanted):
    veto = DeletionFilter(DeletionList(str(tmp_path / "forgotten")))
    sample = sample_of(shards[0], 1)
    veto.on(shards[0])(sample, id_of(0, 1))
    veto.list.add(wanted)
    check = veto.on(shards[0])
    check(sample_of(shards[0], 2), id_of(0, 2))
    with pytest.raises(Rejected, match="withheld"):
        check(sample, id_of(0, 1))
    assert veto.describe() == {}


def test_a_link_is_refused_before_it_is_downloaded(tmp_path):
    veto = DeletionFilter(DeletionList(str(tmp_path / "forgotten")))
    veto.list.add(asking(urls=[url_of(0, 1)], hashes=[77]))
    link = Link(id="list/000000001", ordinal=1, url=url_of(0, 1), caption="c", metadata={})
    with pytest.raises(Rejected, match="withheld"):
        veto.check_link(link)
    other = Link(id="list/000000002", ordinal=2, url=url_of(0, 2), caption="c", metadata={"hash": 77})
    with pytest.raises(Rejected, match="withheld"):
        veto.check_link(other)
    veto.check_link(Link(id="list/3", ordinal=3, url=url_of(0, 2), caption="c", metadata={"hash": 78}))


def test_what_was_withheld_is_withheld_again(shards):
    check = RecordedDeletionFilter([id_of(0, 1)]).on(shards[0])
    check(sample_of(shards[0], 2), id_of(0, 2))
    with pytest.raises(Rejected, match="withheld"):
        check(sample_of(shards[0], 1), id_of(0, 1))
    assert json.dumps(dict(RecordedDeletionFilter([]).describe())) == "{}"
