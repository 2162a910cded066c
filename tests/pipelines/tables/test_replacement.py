"""A committed unit's file is replaced by one with fewer rows, in one commit, whoever else commits."""

from collections.abc import Callable
from pathlib import Path

import pytest
import synthetic_units
from deltalake import DeltaTable
from synthetic_units import SCHEMA, finished, without_first_row

from pipelines.stages.write import WriteUnit
from pipelines.tables import commits
from pipelines.tables.commits import commit_units, replace_units, restore_manifests
from pipelines.tables.committer import recover
from pipelines.tables.table import Snapshot, open_table
from pipelines.tables.unit_files import revised_name, unit_of
from snapfusion.settings import digest


@pytest.fixture
def table(tmp_path: Path) -> Snapshot:
    url = str(tmp_path / "latents")
    synthetic_units.run(url)
    return open_table(url)


def newest(table: Snapshot) -> Snapshot:
    return open_table(table.url)


def rejected_ids(table: Snapshot, unit: str) -> list[str]:
    return [row["id"] for row in newest(table).rejected_rows() if row["unit"] == unit]


def interrupt_open(monkeypatch: pytest.MonkeyPatch, action: Callable[[], object]) -> None:
    """Run `action` once, between the next opening of a Delta table and its use."""
    open_delta, actions = commits.open_delta, [action]

    def opened(location: str) -> DeltaTable:
        delta = open_delta(location)
        if actions:
            actions.pop()()
        return delta

    monkeypatch.setattr(commits, "open_delta", opened)


def test_revised_file_belongs_to_the_same_unit():
    name = revised_name("web-00000-000000-000004", "{}")
    assert unit_of(f"s3://bucket/latents/{name}") == unit_of("web-00000-000000-000004.parquet")


def test_one_commit_replaces_files_for_all_readers(table):
    files = table.units
    assert replace_units(table.url, [without_first_row(files[0]), without_first_row(files[2])])
    after = newest(table)
    assert after.version == table.version + 1
    assert [file.unit for file in after.units] == [file.unit for file in files]
    assert after.num_rows == table.num_rows - 2
    ids = after.read(["id"])["id"].to_pylist()
    assert set(ids) < set(table.read(["id"])["id"].to_pylist())
    assert sorted(DeltaTable(table.url).to_pyarrow_table(columns=["id"])["id"].to_pylist()) == sorted(ids)
    assert open_table(table.url, version=table.version).read().equals(table.read())


def test_siblings_follow_the_new_files(table):
    seconds = {record.unit: record.seconds for record in table.unit_records()}
    old, new = without_first_row(table.units[0])
    replace_units(table.url, [(old, new)])
    after = newest(table)
    assert after.manifests()[old.unit] == new.manifest
    assert rejected_ids(table, old.unit) == ["gone", "s/0"]
    records = {record.unit: record for record in after.unit_records()}
    assert {unit: record.seconds for unit, record in records.items()} == seconds
    assert records[old.unit].sha256 == new.sha256
    assert recover(after) is after


@pytest.mark.parametrize("killed", ["rewrite_siblings", "_rewrite_rows"])
def test_writer_killed_before_its_siblings_is_completed(table, monkeypatch, killed):
    old, new = without_first_row(table.units[0])
    rewrite = commits._rewrite_rows

    def rewrite_rejects(location, *rest, **more):
        return location.endswith(".units") or rewrite(location, *rest, **more)

    functions = {"rewrite_siblings": lambda *_: None, "_rewrite_rows": rewrite_rejects}
    with monkeypatch.context() as patch:
        patch.setattr(commits, killed, functions[killed])
        assert replace_units(table.url, [(old, new)])
    assert old.unit not in newest(table).manifests()
    synthetic_units.run(table.url)
    after = newest(table)
    assert after.manifests()[old.unit] == new.manifest
    assert rejected_ids(table, old.unit) == ["gone", "s/0"]
    assert restore_manifests(after) is after


def test_units_appended_meanwhile_stay(table, monkeypatch):
    late = WriteUnit(url=table.url, schema=SCHEMA, settings=digest(table.identity))(finished(100, 104))
    pair = without_first_row(table.units[0])
    interrupt_open(monkeypatch, lambda: commit_units(table.url, [late]))
    assert replace_units(table.url, [pair])
    units = [file.unit for file in newest(table).units]
    assert late.manifest.unit in units
    assert len(units) == len(set(units)) == len(newest(table).unit_records())


def test_second_replacement_of_a_file_is_refused(table):
    pairs = [without_first_row(file) for file in table.units[:2]]
    assert replace_units(table.url, pairs[:1])
    version = newest(table).version
    assert not replace_units(table.url, pairs)
    assert newest(table).version == version


def test_concurrent_replacements_cannot_both_succeed(table, monkeypatch):
    first, second = (without_first_row(file) for file in table.units[:2])
    interrupt_open(monkeypatch, lambda: replace_units(table.url, [first]))
    assert not replace_units(table.url, [first, second])
    assert newest(table).units[0].revision
    assert not newest(table).units[1].revision


def test_replaced_files_are_no_orphans(table):
    old, new = without_first_row(table.units[0])
    replace_units(table.url, [(old, new)])
    _, uncommitted = without_first_row(newest(table).units[0])
    after = newest(table)
    assert recover(after) is after
    assert Path(old.path).exists()
    assert Path(uncommitted.path).exists()


def test_sibling_logs_hold_no_texts(table):
    replace_units(table.url, [without_first_row(table.units[0])])
    for sibling in ("rejects", "units"):
        for entry in Path(f"{table.url}.{sibling}/_delta_log").glob("*.json"):
            assert b"every fifth" not in entry.read_bytes()
            assert b"environment" not in entry.read_bytes(), "a manifest begins with it"
