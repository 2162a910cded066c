"""Forgotten rows leave every table with what was derived from them; all else stays, to the bit."""

from __future__ import annotations

from pathlib import Path

import copy_inputs as copies
import pytest
from deltalake import DeltaTable
from forgetful_run import PAIRS, TABLES, Run, caption_of, id_of, make_run, make_shards, naming, url_of
from in_process import in_process
from shuffled_rows import read_shuffled

from pipelines.datasets import latents, pairs, targets
from pipelines.datasets.pairs import generate_pairs, withhold_deleted
from pipelines.dedup.duplicates import find_duplicates
from pipelines.dedup.settings import Deduplication
from pipelines.deletion import rewrite as forgetting
from pipelines.deletion.rewrite import delete_rows
from pipelines.rejections import Rejected
from pipelines.sources.captions import Caption
from pipelines.sources.webdataset import list_shards
from pipelines.stages.deletion_filter import DeletionFilter
from pipelines.tables import commits
from pipelines.tables.table import open_table
from pipelines.tables.units import finite_rows
from pipelines.tables.verification import verify_table

GONE = [(0, 1), (0, 8), (0, 9), (1, 0)]
"""One of a unit's three rows, both of a final unit, one of another shard."""
ASKED = naming(urls=tuple(url_of(*row) for row in GONE[:3]), ids=tuple(id_of(*row) for row in GONE))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_teacher) -> Run:
    return make_run(tmp_path_factory.mktemp("whole") / "run", teacher=tiny_teacher)


@pytest.fixture
def run(whole, tmp_path) -> Run:
    return whole.copy(tmp_path / "run")


def bases(run: Run, name: str) -> list[str]:
    ids = run.table(name).read(["id"])["id"].to_pylist()
    return [id_.rpartition("#")[0] or id_ for id_ in ids]


def rows_of(run: Run, name: str) -> dict[str, dict]:
    return {row["id"]: row for row in run.table(name).read().to_pylist()}


def live_files(run: Run) -> list[Path]:
    """The data files that the newest versions read, and the siblings'."""
    urls = [f"{url}{ending}" for url in run.urls for ending in ("", ".rejects", ".units")]
    return [Path(path) for url in urls for path in DeltaTable(url).file_uris()]


def telling(paths) -> list[str]:
    words = [
        word for row in GONE for word in (url_of(*row), caption_of(*row), url_of(*row).partition("/")[2])
    ]
    return [path.name for path in paths if any(word.encode() in path.read_bytes() for word in words)]


def forget_all(run: Run, asked=ASKED):
    run.list.add(asked)
    return {Path(removal.url).name: removal for removal in delete_rows(run.urls, run.list.read())}


def test_the_planted_words_can_be_found(whole):
    assert set(telling(live_files(whole))) >= {"web-00000-000000-000004.parquet"}


def test_rows_go_from_every_table_and_all_others_stay_to_the_bit(run, whole):
    done = forget_all(run)
    for name, draws in (("latents", 1), ("targets", 2), ("pairs", 1)):
        gone = {id_of(*row) for row in GONE}
        assert not gone & set(bases(run, name))
        kept = {id_: row for id_, row in rows_of(whole, name).items() if id_.partition("#")[0] not in gone}
        assert rows_of(run, name) == kept
        assert done[name].rows == len(GONE) * draws
        assert (done[name].before, done[name].after) == (
            whole.table(name).version,
            whole.table(name).version + 1,
        )
        assert [file.unit for file in run.table(name).units] == [
            file.unit for file in whole.table(name).units
        ]


def test_no_live_file_tells_an_address_or_a_caption(run):
    forget_all(run)
    assert telling(live_files(run)) == []


def test_the_accounts_add_up_and_name_the_reason(run):
    forget_all(run)
    for name in TABLES:
        known = open_table(str(run.out / name)).manifests().values()
        taken = [one for account in known for one in account.rejections if one.reason == "forgotten"]
        assert taken
        assert all(one.id.startswith("forgotten:") and not one.detail for one in taken)
        assert sum(account.rows_written for account in known) == run.table(name).num_rows
        assert len(open_table(str(run.out / name)).rejected_rows()) == sum(
            len(account.rejections) for account in known
        )
    places = [
        one.ordinal
        for one in open_table(str(run.out / "latents")).manifests()["web-00000-000008-000010"].rejections
    ]
    assert places == [8, 9]


def test_jobs_started_again_do_nothing_and_refuse_nothing(run):
    forget_all(run)
    versions = [run.table(name).version for name in TABLES]
    run.encode()
    run.teach()
    run.draw()
    assert [run.table(name).version for name in TABLES] == versions


def test_more_draws_and_shards_can_be_added_and_nothing_comes_back(run):
    forget_all(run, ASKED | naming(urls=(url_of(2, 5),)))
    make_shards(run.out / "shards", shards=3)
    assert run.encode().num_rows == 18 - 4 + 9 - 1
    assert run.teach(draws=3).num_rows == 3 * 22
    assert run.draw(draws=2).num_rows == 2 * 22
    for name in TABLES:
        assert not {id_of(*row) for row in [*GONE, (2, 5)]} & set(bases(run, name))
    reasons = {row["reason"] for row in open_table(str(run.out / "latents")).rejected_rows()}
    assert reasons == {"forgotten", "withheld", "not_an_image"}
    assert telling(live_files(run)) == []


def test_a_new_table_of_the_same_run_has_none_of_it(run):
    forget_all(run)
    again = run.encode("again")
    assert again.num_rows == 14
    assert again.identity == run.table("latents").identity


def test_forgetting_twice_does_nothing(run):
    forget_all(run)
    versions = [run.table(name).version for name in TABLES]
    done = forget_all(run)
    assert [run.table(name).version for name in TABLES] == versions
    assert [removal.rows for removal in done.values()] == [0, 0, 0]


def test_a_second_request_to_the_same_units(run, whole):
    forget_all(run, naming(ids=(id_of(0, 1),)))
    forget_all(run)
    once = whole.copy(run.out.with_name("once"))
    forget_all(once)
    for name in TABLES:
        assert rows_of(run, name) == rows_of(once, name)
        for unit, account in open_table(str(run.out / name)).manifests().items():
            other = open_table(str(once.out / name)).manifests()[unit]
            assert sorted(map(str, account.rejections)) == sorted(map(str, other.rejections))
            assert account.start == other.start
    run.encode()
    run.teach(draws=3)
    run.draw(draws=2)


def verified(run: Run, name: str):
    table = run.table(name)
    made_again = {
        "latents": lambda: latents.recomputer(
            table,
            model=run.teacher,
            shards=list_shards(str(run.out / "shards")),
            source="web",
            vetoes=[DeletionFilter(run.list)],
        ),
        "targets": lambda: targets.recomputer(table, teacher=run.teacher, latents=run.table("latents")),
        "pairs": lambda: pairs.recomputer(table, teacher=run.teacher),
    }[name]()
    return verify_table(table, recompute=made_again, units=99, seed=0)


@pytest.mark.parametrize("name", TABLES)
def test_what_is_left_is_made_again_bit_for_bit(run, name):
    forget_all(run)
    found = verified(run, name)
    assert found.faults == ()
    assert found.recomputed == found.exact
    assert found.recomputed + len(found.notes) == found.units
    assert all("all of its rows were forgotten" in note for note in found.notes)


def test_units_with_withheld_and_forgotten_rows_verify(run):
    forget_all(run, naming(urls=(url_of(2, 5),)))
    make_shards(run.out / "shards", shards=3)
    run.encode()
    forget_all(run, ASKED | naming(urls=(url_of(2, 6),)))
    found = verified(run, "latents")
    assert found.faults == ()
    assert found.recomputed == found.exact == found.units


def test_a_row_that_was_rejected_loses_what_is_said_of_it(run):
    done = forget_all(run, naming(ids=(id_of(0, 3),)))
    [told] = [
        row
        for row in open_table(str(run.out / "latents")).rejected_rows()
        if row["unit"].startswith("web-00000")
    ]
    assert (told["reason"], told["detail"]) == ("not_an_image", "")
    assert told["id"].startswith("forgotten:")
    assert done["latents"].rejections == {"not_an_image": 1}
    assert done["latents"].rows == 0
    run.teach()
    run.draw()
    assert verified(run, "latents").faults == verified(run, "targets").faults == ()


class Killed(BaseException):
    """As if the process were killed."""


def killed_at(monkeypatch, *, module, step: str, after: int) -> None:
    real, came = getattr(module, step), 0

    def dying(*arguments, **more):
        nonlocal came
        came += 1
        if came == after:
            raise Killed
        return real(*arguments, **more)

    monkeypatch.setattr(module, step, dying)


@pytest.mark.parametrize(
    ("where", "step", "after"),
    [
        ("forgetting", "write_once", 1),
        ("forgetting", "write_once", 4),
        ("forgetting", "replace_units", 1),
        ("forgetting", "replace_units", 2),
        ("forgetting", "replace_units", 3),
        ("commits", "_rewrite_siblings", 1),
        ("commits", "_rewrite_siblings", 2),
        ("commits", "_rewrite_siblings", 3),
        ("commits", "_rewrite_rows", 2),
        ("commits", "_rewrite_rows", 4),
        ("commits", "_rewrite_rows", 6),
    ],
)
def test_whoever_is_killed_anywhere_ends_as_one_that_was_not(run, whole, monkeypatch, where, step, after):
    once = whole.copy(run.out.with_name("once"))
    forget_all(once)
    run.list.add(ASKED)
    with monkeypatch.context() as patch:
        module = {"forgetting": forgetting, "commits": commits}[where]
        killed_at(patch, module=module, step=step, after=after)
        with pytest.raises(Killed):
            delete_rows(run.urls, run.list.read())
    delete_rows(run.urls, run.list.read())
    for name in TABLES:
        assert rows_of(run, name) == rows_of(once, name)
        assert open_table(str(run.out / name)).manifests() == open_table(str(once.out / name)).manifests()
        assert (
            open_table(str(run.out / name)).rejected_rows()
            == open_table(str(once.out / name)).rejected_rows()
        )
        assert [Path(file.path).name for file in run.table(name).units] == [
            Path(file.path).name for file in once.table(name).units
        ]
    run.teach()
    run.draw()


def test_targets_that_another_job_adds_from_old_latents_are_seen(run, whole, monkeypatch):
    """They are computed from the old LATENTS, and committed after TARGETS were looked at."""
    replace_units, late = forgetting.replace_units, iter([True])

    def with_another(url, files):
        if url.endswith("targets") and next(late, False):
            run.teach(draws=3)
        return replace_units(url, files)

    monkeypatch.setattr(forgetting, "replace_units", with_another)
    forget_all(run)
    assert run.table("targets").num_rows == 3 * 14
    assert not {id_of(*row) for row in GONE} & set(bases(run, "targets"))
    assert run.teach(draws=3).version == run.table("targets").version
    assert telling(live_files(run)) == []


def test_an_orphan_of_a_killed_job_does_not_bring_rows_back(whole, tmp_path, tiny_teacher):
    run = Run(tmp_path / "run", teacher=tiny_teacher)
    make_shards(run.out / "shards")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.tables.committer.commit_units", lambda *_, **__: [])
        run.encode()
    assert run.table("latents").num_rows == 0
    run.list.add(ASKED)
    delete_rows([str(run.out / "latents")], run.list.read())
    assert run.encode().num_rows == 14


def test_a_pinned_version_still_reads_what_it_read(run, whole):
    before = {name: run.table(name) for name in TABLES}
    forget_all(run)
    for name, table in before.items():
        pinned = open_table(str(run.out / name), version=table.version)
        assert pinned.read().equals(whole.table(name).read())


def listed(run: Run, url: Path, *, captions, draws: int = 1):
    return generate_pairs(
        PAIRS.with_values([f"draws={draws}"]),
        teacher=run.teacher,
        captions=withhold_deleted(captions, run.list.read()),
        source="list",
        url=str(url),
        run=in_process,
    )


def test_pairs_of_a_list_whose_ids_are_addresses(run, tmp_path):
    captions = [
        Caption(id=f"http://list.example/{n}", ordinal=n, text=f"caption number {n}") for n in range(6)
    ]
    captions[2] = Rejected("empty_caption").record(id="http://list.example/2", source="list", ordinal=2)
    url = run.out / "listed"
    whole = listed(run, url, captions=captions)
    run.list.add(naming(urls=("https://list.example/1", "https://list.example/2")))
    delete_rows([str(url)], run.list.read())
    left = open_table(str(url))
    assert left.num_rows == whole.num_rows - 1
    assert listed(run, url, captions=captions).version == left.version
    assert listed(run, url, captions=captions, draws=2).num_rows == 2 * 4
    for file in DeltaTable(f"{url}.rejects").file_uris() + DeltaTable(str(url)).file_uris():
        assert b"list.example/1" not in Path(file).read_bytes()
        assert b"list.example/2" not in Path(file).read_bytes()
    table = open_table(str(url))
    found = verify_table(table, recompute=pairs.recomputer(table, teacher=run.teacher), units=99, seed=0)
    assert found.faults == ()
    assert found.exact == found.units


def spoiling(monkeypatch, *, place: str, which: int) -> None:
    """Let a network put out infinity in one row of each unit."""
    real = finite_rows

    def spoilt(values):
        flags = real(values)
        flags[which : which + 1] = [False] * len(flags[which : which + 1])
        return flags

    monkeypatch.setattr(place, spoilt)


def test_rows_that_a_network_lost_keep_their_places(tmp_path, tiny_teacher, monkeypatch):
    run = Run(tmp_path / "run", teacher=tiny_teacher)
    make_shards(run.out / "shards")
    with monkeypatch.context() as patch:
        spoiling(patch, place="pipelines.stages.encode.finite_rows", which=0)
        run.encode()
    with monkeypatch.context() as patch:
        spoiling(patch, place="pipelines.stages.target.finite_rows", which=1)
        spoiling(patch, place="pipelines.stages.generate.finite_rows", which=1)
        run.teach()
        run.draw()
    lost_twice, lost_by_teachers = id_of(0, 2), id_of(0, 6)
    assert lost_twice not in bases(run, "pairs")
    for asked in ((id_of(0, 1),), (lost_by_teachers, id_of(1, 5))):
        forget_all(run, naming(ids=asked))
    versions = [run.table(name).version for name in TABLES]
    run.encode()
    run.teach()
    run.draw()
    assert [run.table(name).version for name in TABLES] == versions
    run.teach(draws=3)
    run.draw(draws=2)
    for name in TABLES:
        assert not {id_of(0, 1), lost_by_teachers, id_of(1, 5)} & set(bases(run, name))
        account = {
            key: row for row in open_table(str(run.out / name)).manifests().values() for key in [row.unit]
        }
        assert all(len(one.ordinals()) == one.rows_written for one in account.values())


def test_fingerprints_and_verdicts_on_copies_go_too(tmp_path):
    shards, table = tmp_path / "shards", tmp_path / "fingerprints"
    first = [copies.row(n) for n in range(4)]
    copies.write_shards(shards, [first, [copies.row(10, url=f"{url_in(first[1])}#again"), copies.row(11)]])

    def judge():
        made = copies.fingerprinted(shards, table, run=in_process)
        return find_duplicates(
            Deduplication(), fingerprints=made, url=str(tmp_path / "duplicates"), read=read_shuffled(0)
        )

    verdicts = {row["id"]: row for row in judge().read().to_pylist()}
    gone = next(row["of"] for row in verdicts.values() if row["of"])
    asked = naming(ids=(gone,))
    done = delete_rows([str(tmp_path / "duplicates"), str(table)], asked)
    assert [removal.rows for removal in done] == [1, 1]
    # That another row copies it stays true, and says no more than where in its shard it stood.
    left = open_table(str(tmp_path / "duplicates"))
    assert gone not in left.read(["id"])["id"].to_pylist()
    assert [row["verdict"] for row in left.read().to_pylist() if row["of"]] == ["duplicate_url"]
    assert delete_rows([left.url, str(table)], asked)[0].units == set()
    assert judge().version == left.version
    copies.write_shards(
        shards,
        [first, [copies.row(10, url=f"{url_in(first[1])}#again"), copies.row(11)], [copies.row(20)]],
    )
    assert judge().num_rows == len(verdicts) - 1 + 1


def url_in(row) -> str:
    return row.url
