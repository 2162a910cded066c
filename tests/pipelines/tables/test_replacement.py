"""A committed unit's file is replaced by one with fewer rows, by one commit, whoever comes between."""

from __future__ import annotations

from pathlib import Path

import pytest
import synthetic_units
from deltalake import DeltaTable
from synthetic_units import SCHEMA, finished, without_first_row

from pipelines.stages.write import WriteUnit
from pipelines.tables import commits
from pipelines.tables.commits import commit_units, replace_units, restore_manifests
from pipelines.tables.committer import recover
from pipelines.tables.table import (
    open_table,
    rejected_rows,
    revised_name,
    unit_manifests,
    unit_of,
    unit_records,
)
from snapfusion.settings import digest


@pytest.fixture
def table(tmp_path: Path) -> str:
    url = str(tmp_path / "latents")
    synthetic_units.run(url)
    return url


def ids_of(url: str) -> list[str]:
    return open_table(url).read(["id"])["id"].to_pylist()


def test_a_file_in_the_place_of_another_belongs_to_the_same_unit():
    name = revised_name("web-00000-000000-000004", "{}")
    assert unit_of(f"s3://bucket/latents/{name}") == unit_of("web-00000-000000-000004.parquet")


def test_one_commit_replaces_files_and_every_reader_sees_it(table):
    before = open_table(table)
    files = before.units
    assert replace_units(table, [without_first_row(files[0]), without_first_row(files[2])])
    after = open_table(table)
    assert after.version == before.version + 1
    assert [file.unit for file in after.units] == [file.unit for file in files]
    assert after.num_rows == before.num_rows - 2
    assert set(ids_of(table)) < set(before.read(["id"])["id"].to_pylist())
    by_delta = DeltaTable(table).to_pyarrow_table(columns=["id"])["id"].to_pylist()
    assert sorted(by_delta) == sorted(ids_of(table))
    assert open_table(table, version=before.version).read().equals(before.read())


def test_the_siblings_say_what_the_new_files_say(table):
    seconds = {record["unit"]: record["seconds"] for record in unit_records(table)}
    old, new = without_first_row(open_table(table).units[0])
    replace_units(table, [(old, new)])
    assert unit_manifests(table)[old.unit] == new.account
    assert [row["id"] for row in rejected_rows(table) if row["unit"] == old.unit] == ["gone", "s/0"]
    records = unit_records(table)
    assert len(records) == len(open_table(table).units)
    assert {record["unit"]: record["seconds"] for record in records} == seconds
    assert next(record for record in records if record["unit"] == old.unit)["sha256"] == new.sha256
    assert recover(table) == 0


def test_a_writer_killed_before_the_siblings_is_put_right(table, monkeypatch):
    old, new = without_first_row(open_table(table).units[0])
    with monkeypatch.context() as patch:
        patch.setattr(commits, "_rewrite_siblings", lambda *_: None)
        assert replace_units(table, [(old, new)])
    assert old.unit not in unit_manifests(table), "the old file's account is none of the new file"
    synthetic_units.run(table)
    assert unit_manifests(table)[old.unit] == new.account
    assert len([row for row in rejected_rows(table) if row["unit"] == old.unit]) == 2
    assert restore_manifests(table) == 0


def test_a_writer_killed_between_the_siblings_is_put_right(table, monkeypatch):
    old, new = without_first_row(open_table(table).units[0])
    restate = commits._rewrite_rows

    def only_rejects(location, *arguments, **more):
        if location.endswith(".rejects"):
            restate(location, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(commits, "_rewrite_rows", only_rejects)
        replace_units(table, [(old, new)])
    assert restore_manifests(table) == 1
    assert len([row for row in rejected_rows(table) if row["unit"] == old.unit]) == 2


def test_what_others_append_meanwhile_stays(table, monkeypatch):
    delta_at = commits.open_delta
    writer = WriteUnit(url=table, schema=SCHEMA, settings=digest(open_table(table).identity))
    late = writer(finished(100, 104, final=False))
    fresh = iter([True])

    def opened(location):
        delta = delta_at(location)
        if next(fresh, False):
            commit_units(table, [late])
        return delta

    pair = without_first_row(open_table(table).units[0])
    monkeypatch.setattr(commits, "open_delta", opened)
    assert replace_units(table, [pair])
    names = [file.unit for file in open_table(table).units]
    assert late.account.unit in names
    assert len(names) == len(set(names)) == len(unit_records(table))


def test_of_two_writers_that_replace_a_file_one_is_told(table):
    files = open_table(table).units
    pairs = [without_first_row(file) for file in files[:2]]
    assert replace_units(table, pairs[:1])
    version = open_table(table).version
    assert not replace_units(table, pairs)
    assert open_table(table).version == version


def test_two_that_come_at_once_cannot_both_succeed(table, monkeypatch):
    first, second = (without_first_row(file) for file in open_table(table).units[:2])
    delta_at = commits.open_delta
    fresh = iter([True])

    def opened(location):
        delta = delta_at(location)
        if next(fresh, False):
            assert replace_units(table, [first])
        return delta

    monkeypatch.setattr(commits, "open_delta", opened)
    assert not replace_units(table, [first, second])
    assert len(open_table(table).units) == len({file.unit for file in open_table(table).units})


def test_a_file_that_was_replaced_is_no_orphan(table):
    old, new = without_first_row(open_table(table).units[0])
    replace_units(table, [(old, new)])
    second = without_first_row(open_table(table).units[0])
    assert Path(old.path).exists()
    version = open_table(table).version
    assert recover(table) == 0
    assert open_table(table).version == version
    assert Path(second[1].path).exists()


def test_the_log_of_the_siblings_keeps_no_text(table):
    old, new = without_first_row(open_table(table).units[0])
    replace_units(table, [(old, new)])
    for sibling in ("rejects", "units"):
        for entry in Path(f"{table}.{sibling}/_delta_log").glob("*.json"):
            assert b"every fifth" not in entry.read_bytes()
            assert b"environment" not in entry.read_bytes(), "an account begins with it"
