"""Files of `.units` are merged while a job commits, and no row of them is lost or doubled."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import synthetic_units
from synthetic_units import IDENTITY, SCHEMA, finished, without_first_row

from pipelines.deletion.erasure import old_sibling_files
from pipelines.stages.write import WriteUnit
from pipelines.tables import merging
from pipelines.tables.commits import commit_units, replace_units
from pipelines.tables.committer import commit_stream
from pipelines.tables.leases import write_lease
from pipelines.tables.merging import merge_unit_files
from pipelines.tables.open_log import OpenLog, TableLogs
from pipelines.tables.settings import Bounds
from pipelines.tables.table import Snapshot, create_table, live_names, open_delta, open_table

COMMITS = 10


@pytest.fixture(autouse=True)
def few_files(monkeypatch):
    monkeypatch.setattr(merging, "FAN_IN", 3)
    monkeypatch.setattr("pipelines.tables.committer.FAN_IN", 3)


@pytest.fixture
def table(tmp_path: Path) -> Snapshot:
    return create_table(str(tmp_path / "latents"), schema=SCHEMA, identity=IDENTITY)


def commit(table: Snapshot, count: int = COMMITS, *, merges: bool = False) -> list[str]:
    """Commit units of one row range each, one by one; returns their names."""
    writer = WriteUnit(url=table.url, schema=SCHEMA, settings="s")
    units = [writer(finished(start, start + 4)) for start in range(0, 4 * count, 4)]
    if merges:
        commit_stream(table, iter(units), bounds=Bounds(commit_seconds=0.0), total=None)
    else:
        logs = TableLogs.of(table.url)
        for unit in units:
            commit_units(table.url, [unit], logs=logs)
    return [unit.manifest.unit for unit in units]


def live(table: Snapshot) -> list[str]:
    return sorted(live_names(open_delta(f"{table.url}.units")))


def test_a_job_merges_the_files_of_its_commits(table):
    units = commit(table, merges=True)
    # Three times three commits and one more.
    assert [name.partition("-")[0] for name in live(table)] == ["merged", "part"]
    assert live(table)[0].startswith("merged-2-")
    newest = open_table(table.url)
    assert [record.unit for record in newest.unit_records()] == units
    assert newest.recorded(["sha256"])["sha256"].null_count == 0


def test_merged_rows_equal_those_of_the_commits(table):
    commit(table)
    before, files = open_table(table.url), live(table)
    records = before.unit_records()
    merge_unit_files(OpenLog(f"{table.url}.units"))
    assert len(live(table)) < len(files) == COMMITS
    assert open_table(table.url).unit_records() == records
    # A reader that has opened the log before still finds its files.
    assert before.unit_records() == records


def test_merge_of_rows_that_are_replaced_meanwhile_is_refused(table, monkeypatch):
    commit(table, 3)
    pair = without_first_row(open_table(table.url).units[0])
    read = merging.read_sibling_files

    def reading(*arguments):
        rows = read(*arguments)
        assert replace_units(table.url, [pair])
        return rows

    with monkeypatch.context() as patch:
        patch.setattr(merging, "read_sibling_files", reading)
        merge_unit_files(OpenLog(f"{table.url}.units"))
    newest = open_table(table.url)
    assert [name.partition("-")[0] for name in live(table)] == ["part", "part", "restated"]
    assert newest.manifests()[pair[0].unit] == pair[1].manifest
    assert len(newest.unit_records()) == 3


def test_rows_of_an_earlier_version_are_merged(table, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(synthetic_units.commits, "UNITS", synthetic_units.commits.UNITS.remove(10))
        commit(table, 2)
    commit(table, 3)
    merge_unit_files(OpenLog(f"{table.url}.units"))
    [merged] = live(table)
    assert pq.read_table(f"{table.url}.units/{merged}")["file"].null_count == 2
    assert len(open_table(table.url).unit_records()) == 3


def test_file_of_a_killed_merge_counts_for_nothing_and_is_erased(table, monkeypatch):
    commit(table, 3)
    with monkeypatch.context() as patch:
        patch.setattr(merging, "try_commit", lambda *_: False)
        merge_unit_files(OpenLog(f"{table.url}.units"))
    [left] = Path(f"{table.url}.units").glob("merged-*")
    assert len(open_table(table.url).unit_records()) == 3
    with write_lease(table.url, purpose="a build"):
        assert old_sibling_files(table.url) == []
    assert old_sibling_files(table.url) == [str(left)]
