"""Units are committed exactly once, whoever is killed and however many run at a time."""

import json
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import synthetic_units
from delta_opens import record_opens
from deltalake import DeltaTable
from synthetic_units import IDENTITY, POINTS, SCHEMA, TOTAL, finished

from pipelines.stages.write import WriteUnit
from pipelines.storage.objects import StorageError, write_once
from pipelines.tables.commits import commit_units, read_written_unit, restore_manifests
from pipelines.tables.committer import TooManyRejected, commit_stream, recover
from pipelines.tables.manifest import UnitManifest, read_manifest, to_parquet
from pipelines.tables.settings import Bounds
from pipelines.tables.table import Snapshot, TableError, create_table, open_table
from pipelines.tables.units import UncoveredRange, uncovered_ranges


def names(url: str) -> list[str]:
    return [file.unit for file in open_table(url).units]


@pytest.fixture
def table(tmp_path: Path) -> Snapshot:
    return create_table(str(tmp_path / "latents"), schema=SCHEMA, identity=IDENTITY)


@pytest.fixture
def writer(table: Snapshot) -> WriteUnit:
    return WriteUnit(url=table.url, schema=SCHEMA, settings="s")


@pytest.fixture(scope="module")
def unkilled(tmp_path_factory: pytest.TempPathFactory) -> str:
    url = str(tmp_path_factory.mktemp("unkilled") / "latents")
    synthetic_units.run(url)
    return url


def check_equal(url: str, other: str) -> None:
    one, two = (
        {path.name: path.read_bytes() for path in Path(table).glob("*.parquet")} for table in (url, other)
    )
    assert one == two
    assert synthetic_units.equal(url, other)
    assert len(open_table(url).unit_records()) == len(open_table(url).units)


@pytest.mark.parametrize("point", POINTS)
def test_killed_run_continues_to_equal_table(point, tmp_path, unkilled):
    url = str(tmp_path / "latents")
    command = [sys.executable, synthetic_units.__file__, url, point]
    killed = subprocess.run(command, check=False, capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert len(names(url)) < len(names(unkilled))
    synthetic_units.run(url)
    check_equal(url, unkilled)


def test_second_run_opens_two_tables_and_commits_nothing(unkilled, monkeypatch):
    before = open_table(unkilled).version
    with monkeypatch.context() as patch:
        opened = record_opens(patch)
        synthetic_units.run(unkilled)
    assert opened == [unkilled, f"{unkilled}.units"]
    assert open_table(unkilled).version == before


def test_rows_read_are_written_or_rejected(unkilled):
    table = open_table(unkilled)
    records = table.unit_records()
    assert sum(record.rows_read for record in records) == TOTAL
    assert all(record.rows_read == record.rows_written + record.rows_rejected for record in records)
    assert table.num_rows + len(table.rejected_rows()) == TOTAL


def test_two_runs_at_once_commit_units_once(tmp_path, unkilled):
    url = str(tmp_path / "latents")
    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(synthetic_units.run, url) for _ in range(2)]:
            future.result()
    assert names(url) == names(unkilled)
    check_equal(url, unkilled)


def test_longer_list_continues_after_short_unit(tmp_path):
    url = str(tmp_path / "latents")
    synthetic_units.run(url, total=6)
    synthetic_units.run(url, total=9)
    assert names(url) == ["s-000000-000004", "s-000004-000006", "s-000006-000008", "s-000008-000009"]


def test_rejected_rows_of_uncommitted_units_are_ignored(table, writer, monkeypatch):
    monkeypatch.setattr(
        "pipelines.tables.commits._commit_rows", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        commit_units(table.url, [writer(finished(0, 4))])
    assert DeltaTable(f"{table.url}.rejects").to_pyarrow_table().num_rows == 1
    assert open_table(table.url).rejected_rows() == []


def test_lost_manifests_are_restored_from_data_files(table, writer, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("pipelines.tables.commits._commit_manifests", lambda *_: None)
        commit_units(table.url, [writer(finished(0, 4))])
    lost = open_table(table.url)
    assert lost.unit_records() == []
    restored = restore_manifests(lost)
    [record] = restored.unit_records()
    assert (record.rows_rejected, record.made_by) == (1, None)
    assert restore_manifests(restored) is restored


def test_origin_is_kept_with_the_manifest(table, writer):
    origin = {"recipe": "mini", "parents": {"latents": {"version": 3}}}
    commit_units(table.url, [writer(finished(0, 4))], origin=origin)
    assert json.loads(open_table(table.url).unit_records()[0].made_by) == origin


def test_existing_file_is_not_rewritten(table, writer):
    first = writer(finished(0, 4))
    before = Path(first.path).stat()
    second = writer(finished(0, 4))
    assert Path(first.path).stat().st_mtime_ns == before.st_mtime_ns
    assert (first.sha256, first.manifest) == (second.sha256, second.manifest)


def test_foreign_orphans_are_refused(table, writer):
    written = writer(finished(0, 4))  # its settings are not the digest of the table's identity
    with pytest.raises(TableError, match="other settings"):
        recover(table)
    Path(written.path).write_bytes(b"PAR1 but torn")
    with pytest.raises(TableError, match=r"s-000000-000004\.parquet"):
        recover(table)


def test_unfinished_file_is_no_orphan(table):
    (Path(table.url) / ".s-000000-000004.parquet.0123").write_bytes(b"half")
    assert recover(table) is table


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rows_per_unit": 8}, "rows_per_unit is 4 there, 8 here"),
        ({"model": {"weights": {"vae": "x"}}}, "model.weights.vae"),
    ],
)
def test_table_of_other_settings_is_refused(table, change, named):
    with pytest.raises(TableError, match=named):
        create_table(table.url, schema=SCHEMA, identity={**IDENTITY, **change})


def test_missing_table_or_kind_is_refused(table, tmp_path):
    with pytest.raises(TableError, match="nothing holds no table"):
        open_table(str(tmp_path / "nothing"))
    with pytest.raises(TableError, match="holds latents; pairs is needed"):
        open_table(table.url, kind="pairs")


def test_pinned_version_does_not_see_later_units(table, writer):
    commit_units(table.url, [writer(finished(0, 4))])
    pinned = open_table(table.url).version
    commit_units(table.url, [writer(finished(4, 8))])
    assert [file.unit for file in open_table(table.url, version=pinned).units] == ["s-000000-000004"]
    assert len(names(table.url)) == 2


def test_units_are_ordered_by_name(table, writer):
    for start in (8, 0, 4):
        commit_units(table.url, [writer(finished(start, start + 4))])
    assert open_table(table.url).read(["id"])["id"].to_pylist() == [f"s/{n}" for n in range(12) if n % 5]


def test_delta_and_parquet_readers_see_the_rows(unkilled):
    by_delta = DeltaTable(unkilled).to_pyarrow_table(columns=["id"])["id"].to_pylist()
    by_parquet = pq.read_table(sorted(Path(unkilled).glob("*.parquet")), columns=["id"])["id"].to_pylist()
    assert sorted(by_delta) == sorted(by_parquet) == sorted(f"s/{n}" for n in range(TOTAL) if n % 5)
    field = pq.read_schema(next(Path(unkilled).glob("*.parquet"))).field("latent")
    assert field.metadata == {b"shape": b"4,2,2", b"dtype": b"<f2"}


def test_manifest_must_add_up(writer):
    with pytest.raises(ValueError, match="5 rows read, but 3 written and 1 rejected"):
        UnitManifest(**{**vars(writer(finished(0, 4)).manifest), "rows_read": 5})


def test_manifest_is_read_back_from_its_file(writer):
    written = writer(finished(0, 4))
    assert read_written_unit(written.path).manifest == written.manifest
    assert read_manifest(to_parquet(pq.read_table(written.path), written.manifest)) == written.manifest


def test_too_many_rejected_rows_stop_the_job(table, writer):
    units = (writer(finished(start, start + 4)) for start in range(0, 40, 4))
    bounds = Bounds(commit_seconds=60.0, max_rejected=0.1, judged_after=8)
    with pytest.raises(TooManyRejected, match=r"2 of 8 rows were rejected, .*10%"):
        commit_stream(table, units, bounds=bounds, total=None)
    assert len(names(table.url)) == 2


def test_uncovered_ranges_end_at_unit_boundaries():
    assert list(uncovered_ranges(10, committed=[(4, 6)], rows_per_unit=4)) == [
        UncoveredRange(start=0, stop=4, final=False),
        UncoveredRange(start=6, stop=8, final=False),
        UncoveredRange(start=8, stop=10, final=True),
    ]
    assert list(uncovered_ranges(4, committed=[(0, 4)], rows_per_unit=4)) == []


def test_worker_in_another_folder_adds_to_the_table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    url = create_table("latents", schema=SCHEMA, identity=IDENTITY).url
    monkeypatch.chdir("/")
    commit_units(url, [WriteUnit(url=url, schema=SCHEMA, settings="s")(finished(0, 4))])
    assert names(str(tmp_path / "latents")) == ["s-000000-000004"]


def test_one_of_many_writers_creates_an_object(tmp_path):
    url = str(tmp_path / "deep" / "object")
    with ThreadPoolExecutor(8) as pool:
        created = list(pool.map(lambda n: write_once(url, bytes([n]) * 1000), range(8)))
    assert Path(url).read_bytes() == bytes([created.index(True)]) * 1000
    assert sum(created) == 1
    assert [path.name for path in Path(url).parent.iterdir()] == ["object"]


def test_unwritable_url_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="file/object cannot be written"):
        write_once(str(tmp_path / "file" / "object"), b"")
