"""A job opens each log once, whatever it commits, and sees what others commit meanwhile."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from delta_opens import record_opens
from synthetic_units import IDENTITY, SCHEMA, finished

from pipelines.deletion.erasure import erase_files
from pipelines.stages.write import WriteUnit
from pipelines.tables import table as tables
from pipelines.tables.commits import WrittenUnit, commit_units
from pipelines.tables.committer import commit_stream
from pipelines.tables.open_log import OpenLog, TableLogs
from pipelines.tables.settings import Bounds
from pipelines.tables.table import Snapshot, create_table, open_delta, open_table


@pytest.fixture
def table(tmp_path: Path) -> Snapshot:
    return create_table(str(tmp_path / "latents"), schema=SCHEMA, identity=IDENTITY)


def units(table: Snapshot, count: int) -> Iterator[WrittenUnit]:
    writer = WriteUnit(url=table.url, schema=SCHEMA, settings="s")
    return (writer(finished(start, start + 4)) for start in range(0, 4 * count, 4))


def test_commits_of_a_job_open_each_log_once(table, monkeypatch):
    opened = record_opens(monkeypatch)
    # A commit reads no file of `.units`.
    monkeypatch.setattr(tables, "read_sibling_files", None)
    after = commit_stream(table, units(table, 5), bounds=Bounds(commit_seconds=0.0), total=None)
    assert sorted(opened) == [table.url, f"{table.url}.rejects", f"{table.url}.units"]
    assert (after.version, len(after.units)) == (5, 5)


def test_units_that_others_commit_meanwhile_are_not_committed_again(table):
    logs = TableLogs.of(table.url)
    first, second, third = units(table, 3)
    commit_units(table.url, [first], logs=logs)
    commit_units(table.url, [second])
    commit_units(table.url, [first, second, third], logs=logs)
    newest = open_table(table.url)
    assert (newest.version, len(newest.units), len(newest.unit_records())) == (3, 3, 3)
    assert len(newest.rejected_rows()) == 3


def test_transactions_are_found_in_a_checkpoint_and_after_it(table):
    first, second, third = units(table, 3)
    commit_units(table.url, [first])
    open_delta(table.url).create_checkpoint()
    commit_units(table.url, [second])
    log = OpenLog(table.url)
    known = [log.has(unit.manifest.unit) for unit in (first, second, third)]
    commit_units(table.url, [third])
    log.newest()
    assert [*known, log.has(third.manifest.unit)] == [True, True, False, True]


def test_log_that_was_pruned_meanwhile_is_opened_again(table):
    logs = TableLogs.of(table.url)
    first, *others, last = units(table, 4)
    commit_units(table.url, [first], logs=logs)
    for unit in others:
        commit_units(table.url, [unit])
    # The siblings' logs are reduced to a checkpoint, and some of the entries that would follow are gone.
    erase_files(table.url, [])
    commit_units(table.url, [first, *others, last], logs=logs)
    newest = open_table(table.url)
    assert (len(newest.units), len(newest.unit_records()), len(newest.rejected_rows())) == (4, 4, 4)
