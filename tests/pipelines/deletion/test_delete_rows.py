"""Deleted rows leave every table with what was derived from them; all else stays, to the bit."""

import itertools
from pathlib import Path

import copy_inputs as copies
import pytest
from deletion_run import PAIRS, TABLES, Run, caption_of, id_of, keys_of, make_shards, url_of
from deltalake import DeltaTable
from in_process import in_process
from latent_inputs import verify
from shuffled_rows import read_shuffled

from pipelines.datasets import latents, pairs, targets
from pipelines.datasets.pairs import generate_pairs, withhold_deleted
from pipelines.dedup.duplicates import find_duplicates
from pipelines.dedup.settings import Deduplication
from pipelines.deletion import rewrite
from pipelines.deletion.rewrite import delete_rows
from pipelines.rejections import Rejected
from pipelines.sources.captions import Caption
from pipelines.sources.webdataset import list_shards
from pipelines.stages.deletion_filter import DeletionFilter
from pipelines.tables import commits
from pipelines.tables.table import open_table
from pipelines.tables.units import finite_rows

DELETED = [(0, 1), (0, 8), (0, 9), (1, 0)]
"""One of a unit's three rows, both of a final unit, one of another shard."""
KEYS = keys_of(urls=[url_of(*row) for row in DELETED[:3]], ids=[id_of(*row) for row in DELETED])


def base_ids(run: Run, name: str) -> set[str]:
    ids = run.table(name).read(["id"])["id"].to_pylist()
    return {id_.rpartition("#")[0] or id_ for id_ in ids}


def rows_of(run: Run, name: str) -> dict[str, dict]:
    return {row["id"]: row for row in run.table(name).read().to_pylist()}


def versions(run: Run) -> list[int]:
    return [run.table(name).version for name in TABLES]


def live_files(run: Run) -> list[Path]:
    """The data files that the newest versions read, and the siblings'."""
    urls = [f"{url}{ending}" for url in run.urls for ending in ("", ".rejects", ".units")]
    return [Path(path) for url in urls for path in DeltaTable(url).file_uris()]


def files_with_texts(run: Run) -> list[str]:
    """The live files that have a URL or caption of a deleted row."""
    texts = [text.encode() for row in DELETED for text in (url_of(*row).partition("/")[2], caption_of(*row))]
    return [path.name for path in live_files(run) if any(text in path.read_bytes() for text in texts)]


def delete(run: Run, keys=KEYS):
    run.list.add(keys)
    return {Path(removal.url).name: removal for removal in delete_rows(run.urls, run.list.read())}


def make_all(run: Run, *, draws: int = 0) -> None:
    """Start all jobs again, with more draws where given."""
    run.encode()
    run.compute_targets(draws=2 + draws)
    run.generate_pairs(draws=1 + draws)


def test_planted_texts_can_be_found(whole_run):
    assert "web-00000-000000-000004.parquet" in files_with_texts(whole_run)


def test_deleted_rows_leave_and_others_stay(run, whole_run):
    removals = delete(run)
    deleted = {id_of(*row) for row in DELETED}
    for name, draws in (("latents", 1), ("targets", 2), ("pairs", 1)):
        rows = rows_of(whole_run, name).items()
        assert rows_of(run, name) == {id_: row for id_, row in rows if id_.partition("#")[0] not in deleted}
        removal, before = removals[name], whole_run.table(name)
        assert (removal.before, removal.after) == (before.version, before.version + 1)
        assert removal.rows == len(DELETED) * draws
        assert [file.unit for file in run.table(name).units] == [file.unit for file in before.units]
    assert files_with_texts(run) == []


def test_manifests_add_up_and_name_the_reason(run):
    delete(run)
    for name in TABLES:
        table = run.table(name)
        manifests = table.manifests().values()
        forgotten = [one for each in manifests for one in each.rejections if one.reason == "forgotten"]
        assert forgotten
        assert all(one.id.startswith("forgotten:") and not one.detail for one in forgotten)
        assert sum(manifest.rows_written for manifest in manifests) == table.num_rows
        assert len(table.rejected_rows()) == sum(len(manifest.rejections) for manifest in manifests)
    final = run.table("latents").manifests()["web-00000-000008-000010"]
    assert [rejection.ordinal for rejection in final.rejections] == [8, 9]


def test_jobs_started_again_do_nothing(run):
    delete(run)
    before = versions(run)
    make_all(run)
    assert versions(run) == before


def test_deleted_rows_stay_out_of_new_units(run):
    delete(run, KEYS | keys_of(urls=[url_of(2, 5)]))
    make_shards(run.out / "shards", shards=3)
    assert run.encode().num_rows == 18 - 4 + 9 - 1
    assert run.compute_targets(draws=3).num_rows == 3 * 22
    assert run.generate_pairs(draws=2).num_rows == 2 * 22
    for name in TABLES:
        assert not {id_of(*row) for row in [*DELETED, (2, 5)]} & base_ids(run, name)
    reasons = {row["reason"] for row in run.table("latents").rejected_rows()}
    assert reasons == {"forgotten", "withheld", "not_an_image"}
    assert files_with_texts(run) == []


def test_new_table_of_the_run_lacks_deleted_rows(run):
    delete(run)
    again = run.encode("again")
    assert (again.num_rows, again.identity) == (14, run.table("latents").identity)


def test_second_deletion_does_nothing(run):
    delete(run)
    before = versions(run)
    assert [removal.rows for removal in delete(run).values()] == [0, 0, 0]
    assert versions(run) == before


def test_second_request_to_the_same_units(run, whole_run):
    delete(run, keys_of(ids=[id_of(0, 1)]))
    delete(run)
    once = whole_run.copy(run.out.with_name("once"))
    delete(once)
    for name in TABLES:
        assert rows_of(run, name) == rows_of(once, name)
        others = once.table(name).manifests()
        for unit, manifest in run.table(name).manifests().items():
            assert sorted(map(str, manifest.rejections)) == sorted(map(str, others[unit].rejections))
            assert manifest.start == others[unit].start
    make_all(run, draws=1)


def verified(run: Run, name: str):
    table = run.table(name)
    if name == "latents":
        inputs = {"shards": list_shards(str(run.out / "shards")), "filters": [DeletionFilter(run.list)]}
        recompute = latents.recomputer(table, model=run.teacher, source="web", **inputs)
    elif name == "targets":
        recompute = targets.recomputer(table, teacher=run.teacher, latents=run.table("latents"))
    else:
        recompute = pairs.recomputer(table, teacher=run.teacher)
    return verify(table, recompute)


@pytest.mark.parametrize("name", TABLES)
def test_remaining_rows_are_recomputed_exactly(run, name):
    delete(run)
    report = verified(run, name)
    assert report.faults == ()
    assert report.recomputed == report.exact
    assert report.recomputed + len(report.notes) == report.units
    assert all("all of its rows" in note for note in report.notes)


def test_withheld_and_deleted_rows_verify(run):
    delete(run, keys_of(urls=[url_of(2, 5)]))
    make_shards(run.out / "shards", shards=3)
    run.encode()
    delete(run, KEYS | keys_of(urls=[url_of(2, 6)]))
    report = verified(run, "latents")
    assert report.faults == ()
    assert report.recomputed == report.exact == report.units


def test_rejected_row_loses_id_and_detail(run):
    removals = delete(run, keys_of(ids=[id_of(0, 3)]))
    [row] = [row for row in run.table("latents").rejected_rows() if row["unit"].startswith("web-00000")]
    assert (row["reason"], row["detail"]) == ("not_an_image", "")
    assert row["id"].startswith("forgotten:")
    assert (removals["latents"].rejections, removals["latents"].rows) == ({"not_an_image": 1}, 0)
    run.compute_targets()
    run.generate_pairs()
    assert verified(run, "latents").faults == verified(run, "targets").faults == ()


class Killed(BaseException):
    """As if the process were killed."""


def kill_at(monkeypatch, module, function: str, *, after: int) -> None:
    real, calls = getattr(module, function), itertools.count(1)

    def killing(*arguments, **options):
        if next(calls) == after:
            raise Killed
        return real(*arguments, **options)

    monkeypatch.setattr(module, function, killing)


@pytest.mark.parametrize(
    ("module", "function", "after"),
    [
        *((rewrite, "write_unit", after) for after in (1, 4)),
        *((rewrite, "replace_units", after) for after in (1, 2)),
        *((commits, "rewrite_siblings", after) for after in (2,)),
        *((commits, "_rewrite_rows", after) for after in (4,)),
        *(
            pytest.param(*kill, marks=pytest.mark.slow)
            for kill in (
                (rewrite, "replace_units", 3),
                *((commits, "rewrite_siblings", after) for after in (1, 3)),
                *((commits, "_rewrite_rows", after) for after in (2, 6)),
            )
        ),
    ],
)
def test_killed_deletion_ends_like_an_unkilled_one(run, whole_run, monkeypatch, module, function, after):
    once = whole_run.copy(run.out.with_name("once"))
    delete(once)
    run.list.add(KEYS)
    with monkeypatch.context() as patch:
        kill_at(patch, module, function, after=after)
        with pytest.raises(Killed):
            delete_rows(run.urls, run.list.read())
    delete_rows(run.urls, run.list.read())
    for name in TABLES:
        table, expected = run.table(name), once.table(name)
        assert rows_of(run, name) == rows_of(once, name)
        assert table.manifests() == expected.manifests()
        assert table.rejected_rows() == expected.rejected_rows()
        names, expected_names = ({Path(file.path).name for file in one.units} for one in (table, expected))
        assert names == expected_names
    run.compute_targets()
    run.generate_pairs()


def test_targets_added_meanwhile_are_found(run, monkeypatch):
    """They are computed from the old LATENTS, and committed after TARGETS were searched."""
    replace_units, late = rewrite.replace_units, iter([True])

    def with_another(url, units):
        if url.endswith("targets") and next(late, False):
            run.compute_targets(draws=3)
        return replace_units(url, units)

    monkeypatch.setattr(rewrite, "replace_units", with_another)
    delete(run)
    assert run.table("targets").num_rows == 3 * 14
    assert not {id_of(*row) for row in DELETED} & base_ids(run, "targets")
    assert run.compute_targets(draws=3).version == run.table("targets").version
    assert files_with_texts(run) == []


def test_orphan_of_a_killed_job_loses_rows(tmp_path, tiny_teacher):
    run = Run(tmp_path / "run", teacher=tiny_teacher)
    make_shards(run.out / "shards")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.tables.committer.commit_units", lambda *_, **__: [])
        run.encode()
    assert run.table("latents").num_rows == 0
    run.list.add(KEYS)
    delete_rows([str(run.out / "latents")], run.list.read())
    assert run.encode().num_rows == 14


def test_pinned_version_still_has_deleted_rows(run, whole_run):
    before = versions(run)
    delete(run)
    for name, version in zip(TABLES, before, strict=True):
        assert open_table(str(run.out / name), version=version).read().equals(whole_run.table(name).read())


@pytest.mark.slow
def test_pairs_whose_caption_ids_are_urls(run):
    captions = [Caption(id=f"http://list.example/{n}", ordinal=n, text=f"caption {n}") for n in range(6)]
    captions[2] = Rejected("empty_caption").record(id="http://list.example/2", source="list", ordinal=2)
    url = str(run.out / "listed")

    def generate(draws: int = 1):
        settings, left = PAIRS.with_values([f"draws={draws}"]), withhold_deleted(captions, run.list.read())
        inputs = {"teacher": run.teacher, "captions": left, "source": "list", "url": url}
        return generate_pairs(settings, run=in_process, **inputs)

    rows = generate().num_rows
    run.list.add(keys_of(urls=["https://list.example/1", "https://list.example/2"]))
    delete_rows([url], run.list.read())
    table = open_table(url)
    assert table.num_rows == rows - 1
    assert generate().version == table.version
    assert generate(draws=2).num_rows == 2 * 4
    for file in DeltaTable(f"{url}.rejects").file_uris() + DeltaTable(url).file_uris():
        assert b"list.example/1" not in Path(file).read_bytes()
        assert b"list.example/2" not in Path(file).read_bytes()
    table = open_table(url)
    report = verify(table, pairs.recomputer(table, teacher=run.teacher))
    assert report.faults == ()
    assert report.exact == report.units


def make_infinite(monkeypatch, stage: str, *, row: int) -> None:
    """Let a network give infinity for one row of each unit."""

    def flags(values):
        return [finite and index != row for index, finite in enumerate(finite_rows(values))]

    monkeypatch.setattr(f"pipelines.stages.{stage}.finite_rows", flags)


def test_rows_not_finite_keep_their_ordinals(tmp_path, tiny_teacher, monkeypatch):
    run = Run(tmp_path / "run", teacher=tiny_teacher)
    make_shards(run.out / "shards")
    with monkeypatch.context() as patch:
        make_infinite(patch, "encode", row=0)
        run.encode()
        make_infinite(patch, "target", row=1)
        make_infinite(patch, "generate", row=1)
        run.compute_targets()
        run.generate_pairs()
    lost_twice, lost_by_teachers = id_of(0, 2), id_of(0, 6)
    assert lost_twice not in base_ids(run, "pairs")
    for ids in ([id_of(0, 1)], [lost_by_teachers, id_of(1, 5)]):
        delete(run, keys_of(ids=ids))
    before = versions(run)
    make_all(run)
    assert versions(run) == before
    make_all(run, draws=1)
    for name in TABLES:
        assert not {id_of(0, 1), lost_by_teachers, id_of(1, 5)} & base_ids(run, name)
        for manifest in run.table(name).manifests().values():
            assert len(manifest.ordinals()) == manifest.rows_written


def test_fingerprints_and_duplicates_lose_rows(tmp_path):
    shards, table, url = tmp_path / "shards", tmp_path / "fingerprints", str(tmp_path / "duplicates")
    first = [copies.row(n) for n in range(4)]
    second = [copies.row(10, url=f"{first[1].url}#again"), copies.row(11)]
    copies.write_shards(shards, [first, second])

    def deduplicate():
        fingerprints = copies.fingerprinted(shards, table, run=in_process)
        return find_duplicates(Deduplication(), fingerprints=fingerprints, url=url, read=read_shuffled(0))

    verdicts = deduplicate().read().to_pylist()
    original = next(row["of"] for row in verdicts if row["of"])
    keys = keys_of(ids=[original])
    assert [removal.rows for removal in delete_rows([url, str(table)], keys)] == [1, 1]
    # That another row copies it stays true, and tells only its position in its shard.
    left = open_table(url)
    assert original not in left.read(["id"])["id"].to_pylist()
    assert [row["verdict"] for row in left.read().to_pylist() if row["of"]] == ["duplicate_url"]
    assert delete_rows([url, str(table)], keys)[0].units == set()
    assert deduplicate().version == left.version
    copies.write_shards(shards, [first, second, [copies.row(20)]])
    assert deduplicate().num_rows == len(verdicts) - 1 + 1
