"""Compaction: a new table of fewer, larger files with the rows, ids and order of its parent."""

import itertools
from pathlib import Path

import pytest
from deletion_run import TABLES, id_of, keys_of, make_shards, url_of
from in_process import in_process
from latent_inputs import data_files, first_units, forge, verify

from jobs.cli.job import Job
from jobs.cli.recomputers import recompute_for
from jobs.recipes.registry import recipe_named
from pipelines.datasets.compaction import compact_table, recomputer
from pipelines.datasets.settings import CompactionSettings
from pipelines.deletion.rewrite import delete_rows
from pipelines.deletion.table_matches import deletion_rank
from pipelines.loading.branches import BranchLoader, count_branch_rows
from pipelines.loading.loader import BatchLoader
from pipelines.loading.settings import LoaderSettings
from pipelines.tables.table import TableError, open_table

FILE_MIB = {"latents": 0.012, "targets": 0.03, "pairs": 0.03}
KEYS = keys_of(urls=[url_of(0, 1)], ids=[id_of(0, 1), id_of(1, 8)])


def compact(run, name, *, url: Path | None = None, runner=in_process, file_mib: float | None = None):
    """As `jobs.compact`."""
    settings = CompactionSettings(file_mib=file_mib or FILE_MIB[name])
    return compact_table(run.table(name), settings, url=str(url or run.out / f"{name}-compacted"), run=runner)


def verified(table, run, name):
    return verify(table, recomputer(table, parent=run.table(name)))


@pytest.mark.parametrize("name", TABLES)
def test_rows_ids_and_order_stay(run, name):
    parent = run.table(name)
    table = compact(run, name)
    assert table.read().equals(parent.read())
    assert 1 < len(table.units) < len(parent.units)
    report = verified(table, run, name)
    assert (report.faults, report.notes) == ((), ())
    assert (report.rows, report.recomputed, report.exact) == (parent.num_rows, report.units, report.units)
    assert run.table(name).version == parent.version


def test_files_have_the_given_size(run):
    parent = run.table("latents").units
    two = compact(run, "latents", file_mib=2 * max(file.size for file in parent) / 2**20)
    rows = [file.rows for file in parent]
    assert [file.rows for file in two.units] == [sum(rows[at : at + 2]) for at in range(0, len(rows), 2)]
    manifests = [two.manifests()[file.unit] for file in two.units]
    assert [one.start for one in manifests] == [0, *(one.stop for one in manifests[:-1])]
    one = compact(run, "latents", url=run.out / "one", file_mib=64.0)
    assert [file.rows for file in one.units] == [18]
    same = compact(run, "latents", url=run.out / "same", file_mib=0.0001)
    assert [file.rows for file in same.units] == rows


def test_branches_of_targets_stay_apart(run):
    parent, table = run.table("targets"), compact(run, "targets", file_mib=64.0)
    assert len(table.units) == len({unit.unit.rpartition("-web")[0] for unit in parent.units})
    for guided in (False, True):
        assert count_branch_rows(table, guided=guided) == count_branch_rows(parent, guided=guided)
    loader = BranchLoader(
        table, guided=lambda step: step % 2 == 1, global_batch=4, seed=0, settings=LoaderSettings()
    )
    batches = list(itertools.islice(loader.stream(0), 4))
    assert [["w" in batch.columns for batch in batches]] == [[False, True, False, True]]


@pytest.mark.parametrize("units", [0, 1])
def test_a_stopped_compaction_resumes_to_equal_bytes(run, units):
    whole = compact(run, "pairs", url=run.out / "whole")
    compact(run, "pairs", runner=first_units(units))
    compact(run, "pairs")
    assert data_files(run.out / "pairs-compacted") == data_files(run.out / "whole")
    assert open_table(str(run.out / "pairs-compacted")).identity == whole.identity


def test_a_finished_compaction_does_nothing(run):
    table = compact(run, "pairs")
    assert compact(run, "pairs").version == table.version


def test_a_grown_parent_changes_nothing(run):
    compact(run, "latents", runner=first_units(1))
    make_shards(run.out / "shards", shards=3)
    before = run.table("latents").read()
    assert run.encode().num_rows > before.num_rows
    table = compact(run, "latents")
    assert table.read().equals(before)
    assert verified(table, run, "latents").faults == ()


def test_deletion_reaches_parent_and_compacted_table(run):
    for name in TABLES:
        compact(run, name)
    names = [*TABLES, *(f"{name}-compacted" for name in TABLES)]
    run.list.add(KEYS)
    urls = sorted((str(run.out / name) for name in names), key=lambda url: deletion_rank(open_table(url)))
    removals = {Path(one.url).name: one for one in delete_rows(urls, run.list.read())}
    assert [Path(url).name for url in urls[:2]] == ["pairs-compacted", "pairs"]
    for name in TABLES:
        table = run.table(f"{name}-compacted")
        assert removals[f"{name}-compacted"].rows == removals[name].rows > 0
        assert removals[f"{name}-compacted"].notes == []
        assert table.read().equals(run.table(name).read())
        assert verified(table, run, name).faults == ()


def test_a_deletion_between_kill_and_resume(run):
    compact(run, "latents", runner=first_units(1))
    run.list.add(KEYS)
    delete_rows([str(run.out / "latents-compacted"), *run.urls], run.list.read())
    table = compact(run, "latents")
    assert table.read().equals(run.table("latents").read())
    assert not {id_of(0, 1), id_of(1, 8)} & {*table.read(["id"])["id"].to_pylist()}
    assert verified(table, run, "latents").faults == ()


def test_a_training_on_the_parent_goes_on(run):
    def batches(start, count):
        pinned = open_table(str(run.out / "latents"), version=version)
        loader = BatchLoader(
            pinned, columns=("latent",), global_batch=4, seed=3, settings=LoaderSettings(window_units=2)
        )
        return [batch.ids for batch in itertools.islice(loader.stream(start), count)]

    version = run.table("latents").version
    before = batches(0, 8)
    compact(run, "latents")
    assert batches(3, 5) == before[3:]


def test_verification_finds_other_rows(run):
    table = compact(run, "latents")
    forge(Path(table.units[0].path), column="caption")
    faults = verified(open_table(table.url), run, "latents").faults
    assert any("column caption differs" in fault for fault in faults)


def test_a_compacted_table_outlives_its_parent(run):
    table = compact(run, "latents")
    (run.out / "latents").rename(run.out / "elsewhere")
    recipe = recipe_named("mini").with_values([f"model={run.teacher}"])
    job = Job(verb="verify_table", recipe=recipe, out=str(run.out), target=table.url)
    report = verify(table, recompute_for(job, table))
    assert report.faults == ()
    assert len(report.notes) == len(table.units)
    assert all("its parent" in note and "is gone" in note for note in report.notes)


def test_other_tables_and_sizes_are_refused(run):
    compact(run, "latents")
    with pytest.raises(TableError, match=r"compacted.file_mib is 0.012 there, 1.0 here"):
        compact(run, "latents", file_mib=1.0)
    with pytest.raises(TableError, match="made with other settings"):
        compact(run, "pairs", url=run.out / "latents-compacted")
    with pytest.raises(TableError, match="made with other settings"):
        run.encode("latents-compacted")
    with pytest.raises(TableError, match="is not the table that"):
        recomputer(run.table("latents-compacted"), parent=run.table("pairs"))
