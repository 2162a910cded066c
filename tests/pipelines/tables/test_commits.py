"""Units are committed exactly once, whoever is killed and however many run at a time."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import synthetic_units
from deltalake import DeltaTable
from synthetic_units import IDENTITY, POINTS, SCHEMA, TOTAL, finished

from pipelines.stages.write import WriteUnit
from pipelines.storage.objects import StorageError, write_once
from pipelines.tables.commits import commit_units, read_written_unit, restore_manifests
from pipelines.tables.committer import TooManyRejected, commit_stream, recover
from pipelines.tables.manifest import UnitManifest, read_manifest, to_parquet
from pipelines.tables.settings import Bounds
from pipelines.tables.table import (
    TableError,
    create_table,
    open_table,
    rejected_rows,
    unit_manifests,
    unit_records,
)
from pipelines.tables.units import UncoveredRange, uncovered_ranges


def files(url: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(url).glob("*.parquet"))}


def rejected(url: str) -> list[tuple[str, str, str]]:
    return [(row["unit"], row["id"], row["reason"]) for row in rejected_rows(url)]


@pytest.fixture
def table(tmp_path: Path) -> str:
    url = str(tmp_path / "latents")
    create_table(url, schema=SCHEMA, identity=IDENTITY)
    return url


@pytest.fixture
def writer(table: str) -> WriteUnit:
    return WriteUnit(url=table, schema=SCHEMA, settings="s")


@pytest.fixture(scope="module")
def unkilled(tmp_path_factory: pytest.TempPathFactory) -> str:
    url = str(tmp_path_factory.mktemp("unkilled") / "latents")
    synthetic_units.run(url)
    return url


@pytest.mark.parametrize("point", POINTS)
def test_run_killed_anywhere_and_started_again_equals_an_unkilled_one(point, tmp_path, unkilled):
    url = str(tmp_path / "latents")
    command = [sys.executable, synthetic_units.__file__, url]
    killed = subprocess.run([*command, point], check=False, capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert len(open_table(url).units) < len(open_table(unkilled).units)
    synthetic_units.run(url)
    assert files(url) == files(unkilled)
    assert open_table(url).read().equals(open_table(unkilled).read())
    assert rejected(url) == rejected(unkilled)
    assert unit_manifests(url) == unit_manifests(unkilled)


def test_run_again_after_success_does_nothing(unkilled):
    before = open_table(unkilled).version
    synthetic_units.run(unkilled)
    assert open_table(unkilled).version == before


def test_rows_read_are_rows_written_plus_rows_rejected(unkilled):
    records = unit_records(unkilled)
    assert sum(record["rows_read"] for record in records) == TOTAL
    assert all(record["rows_read"] == record["rows_written"] + record["rows_rejected"] for record in records)
    assert open_table(unkilled).num_rows + len(rejected(unkilled)) == TOTAL


def test_two_runs_at_once_commit_each_unit_once(tmp_path, unkilled):
    url = str(tmp_path / "latents")
    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(synthetic_units.run, url) for _ in range(2)]:
            future.result()
    assert files(url) == files(unkilled)
    assert [unit.unit for unit in open_table(url).units] == [unit.unit for unit in open_table(unkilled).units]
    assert rejected(url) == rejected(unkilled)
    assert len(unit_records(url)) == len(open_table(url).units)


def test_a_longer_list_goes_on_after_its_last_short_unit(tmp_path):
    url = str(tmp_path / "latents")
    synthetic_units.run(url, total=6)
    synthetic_units.run(url, total=9)
    assert [unit.unit for unit in open_table(url).units] == [
        "s-000000-000004",
        "s-000004-000006",
        "s-000006-000008",
        "s-000008-000009",
    ]


def test_rejects_of_a_unit_that_was_never_committed_do_not_count(table, writer, monkeypatch):
    monkeypatch.setattr(
        "pipelines.tables.commits._commit_rows", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        commit_units(table, [writer(finished(0, 4, final=True))])
    assert DeltaTable(f"{table}.rejects").to_pyarrow_table().num_rows == 1
    assert rejected_rows(table) == []


def test_lost_accounts_are_restored_from_the_data_files(table, writer, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("pipelines.tables.commits._commit_manifests", lambda *_: None)
        commit_units(table, [writer(finished(0, 4, final=True))])
    assert unit_records(table) == []
    assert restore_manifests(table) == 1
    assert unit_records(table)[0]["rows_rejected"] == 1
    assert unit_records(table)[0]["made_by"] is None
    assert restore_manifests(table) == 0


def test_what_made_a_unit_stands_beside_its_account(table, writer):
    origin = {"recipe": "mini", "parents": {"latents": {"version": 3}}}
    commit_units(table, [writer(finished(0, 4, final=True))], origin=origin)
    assert json.loads(unit_records(table)[0]["made_by"]) == origin


def test_a_file_that_is_there_is_never_rewritten(table, writer):
    first = writer(finished(0, 4, final=False))
    before = Path(first.path).stat()
    second = writer(finished(0, 4, final=False))
    assert Path(first.path).stat().st_mtime_ns == before.st_mtime_ns
    assert (first.sha256, first.account) == (second.sha256, second.account)


def test_an_orphan_that_is_no_unit_of_ours_is_named(table):
    orphan = Path(table) / "s-000000-000004.parquet"
    orphan.write_bytes(b"PAR1 but torn")
    with pytest.raises(TableError, match=r"s-000000-000004\.parquet .* remove it"):
        recover(table)


def test_an_orphan_made_with_other_settings_is_refused(table, writer):
    writer(finished(0, 4, final=True))  # its settings are not the digest of the table's identity
    with pytest.raises(TableError, match="other settings than this table; remove it"):
        recover(table)


def test_a_file_that_was_being_written_is_not_taken_for_a_unit(table):
    (Path(table) / ".s-000000-000004.parquet.0123").write_bytes(b"half")
    assert recover(table) == 0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rows_per_unit": 8}, "rows_per_unit is 4 there, 8 here"),
        ({"model": {"weights": {"vae": "x"}}}, "model.weights.vae"),
    ],
)
def test_a_table_made_with_other_settings_is_refused_by_name(table, change, named):
    with pytest.raises(TableError, match=named):
        create_table(table, schema=SCHEMA, identity={**IDENTITY, **change})


def test_a_place_without_a_table_and_one_of_another_kind_are_refused(table, tmp_path):
    with pytest.raises(TableError, match="holds no table"):
        open_table(str(tmp_path / "nothing"))
    with pytest.raises(TableError, match="holds latents; pairs is needed"):
        open_table(table, kind="pairs")


def test_a_pinned_version_does_not_see_later_units(table, writer):
    commit_units(table, [writer(finished(0, 4, final=False))])
    pinned = open_table(table).version
    commit_units(table, [writer(finished(4, 8, final=True))])
    assert [unit.unit for unit in open_table(table, version=pinned).units] == ["s-000000-000004"]
    assert len(open_table(table).units) == 2


def test_units_are_read_in_order_of_their_names_whatever_the_order_of_arrival(table, writer):
    for start in (8, 0, 4):
        commit_units(table, [writer(finished(start, start + 4, final=False))])
    assert open_table(table).read(["id"]).column("id").to_pylist() == [f"s/{n}" for n in range(12) if n % 5]


def test_any_delta_reader_and_any_parquet_reader_see_the_rows(unkilled):
    by_delta = DeltaTable(unkilled).to_pyarrow_table(columns=["id"]).column("id").to_pylist()
    by_parquet = [row for path in sorted(files(unkilled)) for row in ids_of(Path(unkilled) / path)]
    assert sorted(by_delta) == sorted(by_parquet) == sorted(f"s/{n}" for n in range(TOTAL) if n % 5)
    field = pq.read_schema(next(Path(unkilled).glob("*.parquet"))).field("latent")
    assert field.metadata == {b"shape": b"4,2,2", b"dtype": b"<f2"}


def ids_of(path: Path) -> list[str]:
    return pq.read_table(path, columns=["id"]).column("id").to_pylist()


def test_an_account_that_does_not_add_up_cannot_be_made(table, writer):
    with pytest.raises(ValueError, match="5 rows read, but 3 written and 1 rejected"):
        UnitManifest(**{**vars(writer(finished(0, 4, final=True)).account), "rows_read": 5})


def test_an_account_survives_its_file(table, writer):
    written = writer(finished(0, 4, final=True))
    again = read_written_unit(written.path)
    assert again.account == written.account
    data = to_parquet(pq.read_table(written.path), written.account)
    assert read_manifest(data) == written.account


def test_a_job_stops_when_too_much_is_rejected_and_keeps_what_it_has(table, writer):
    units = (writer(finished(start, start + 4, final=False)) for start in range(0, 40, 4))
    bounds = Bounds(commit_seconds=60.0, max_rejected=0.1, judged_after=8)
    with pytest.raises(TooManyRejected, match=r"2 of 8 rows were rejected, more than the bound of 10%"):
        commit_stream(table, units, bounds=bounds, total=None)
    assert len(open_table(table).units) == 2


def test_gaps_are_cut_at_unit_boundaries_and_at_what_is_committed():
    assert list(uncovered_ranges(10, committed=[(4, 6)], rows_per_unit=4)) == [
        UncoveredRange(start=0, stop=4, final=False),
        UncoveredRange(start=6, stop=8, final=False),
        UncoveredRange(start=8, stop=10, final=True),
    ]
    assert list(uncovered_ranges(4, committed=[(0, 4)], rows_per_unit=4)) == []


def test_of_two_writers_of_one_object_one_wins(tmp_path):
    url = str(tmp_path / "deep" / "object")
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda n: write_once(url, bytes([n]) * 1000), range(8)))
    assert sum(won) == 1
    assert Path(url).read_bytes() == bytes([won.index(True)]) * 1000
    assert [path.name for path in Path(url).parent.iterdir()] == ["object"]


def test_a_place_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="file/object cannot be written"):
        write_once(str(tmp_path / "file" / "object"), b"")
