"""DUPLICATES: copies of every kind lose against the row that came first, and never reach LATENTS."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from copy_inputs import (
    LATENTS,
    SETTINGS,
    encoded,
    fingerprinted,
    near_copies,
    photograph,
    row,
    write_shards,
)
from in_process import in_process
from ray.data import DataContext
from shuffled_rows import read_shuffled

from pipelines.datasets.latents import encode_latents
from pipelines.dedup import duplicates
from pipelines.dedup.decontamination import fingerprint_evaluation
from pipelines.dedup.duplicates import count_verdicts, find_duplicates
from pipelines.dedup.fingerprints import fingerprint_shards
from pipelines.dedup.settings import Deduplication, EvaluationSet
from pipelines.ray_data.shuffle import read_on_ray
from pipelines.sources.webdataset import list_shards
from pipelines.stages.duplicates import DuplicateFilter
from pipelines.tables.commits import commit_round, commit_units
from pipelines.tables.table import Snapshot, TableError, open_table

DEFAULT = Deduplication()
EVERYTHING = Deduplication(caption=True)


def judge(
    tmp_path: Path, *, settings: Deduplication = DEFAULT, name: str = "duplicates", read=None, **more
) -> Snapshot:
    """A round of the fingerprints of `tmp_path/shards`, which are brought up to it first."""
    fingerprints = fingerprinted(tmp_path / "shards", tmp_path / "fingerprints", run=in_process)
    read = read or read_shuffled(0)
    return find_duplicates(settings, fingerprints=fingerprints, url=str(tmp_path / name), read=read, **more)


def refused(table: Snapshot) -> dict[str, tuple[str, str]]:
    """Of each refused row the reason and the first row, both rows by the end of their key."""
    return {
        one["id"][-3:]: (one["verdict"], one["of"].removeprefix("web/")[-3:])
        for one in table.read().to_pylist()
        if one["verdict"] is not None
    }


@pytest.fixture
def planted(tmp_path) -> Path:
    """Two shards; rows of the second, and one of the first, copy rows of the first."""
    near = near_copies(2)
    first = [row(n) for n in range(6)]
    first.append(row(6, caption="PHOTOGRAPH, number 4!"))
    second = [
        row(100, url="https://ORIGIN/0.jpg#top"),
        row(101, image=encoded(photograph(1))),
        *(row(102 + n, image=image) for n, image in enumerate(near.values())),
        row(106),
    ]
    write_shards(tmp_path / "shards", [first, second])
    return tmp_path


KINDS = {
    "100": ("duplicate_url", "000"),
    "101": ("duplicate_image", "001"),
    "102": ("near_duplicate_image", "002"),
    "103": ("near_duplicate_image", "002"),
    "104": ("near_duplicate_image", "002"),
    "105": ("near_duplicate_image", "002"),
}
CAPTIONS = {"006": ("duplicate_caption", "004")}


def test_copies_of_each_kind_are_found_across_shards(planted):
    assert refused(judge(planted)) == KINDS
    table = judge(planted, settings=EVERYTHING, name="all")
    assert refused(table) == KINDS | CAPTIONS
    assert count_verdicts(table) == {
        "duplicate_url": 1,
        "duplicate_image": 1,
        "near_duplicate_image": 4,
        "duplicate_caption": 1,
    }


@pytest.mark.parametrize(
    ("settings", "reasons"),
    [
        (Deduplication(url=False), {"duplicate_image", "near_duplicate_image"}),
        (Deduplication(max_hamming=None), {"duplicate_url", "duplicate_image"}),
        (Deduplication(url=False, max_hamming=None), {"duplicate_image"}),
        (Deduplication(url=False, image=False, max_hamming=0), {"near_duplicate_image"}),
        (Deduplication(url=False, image=False, max_hamming=None), set()),
    ],
)
def test_only_what_is_asked_for_counts(planted, settings, reasons):
    assert {reason for reason, _ in refused(judge(planted, settings=settings)).values()} == reasons


def test_every_row_has_a_verdict_and_rows_read_are_rows_written(planted):
    table = judge(planted)
    fingerprints = open_table(str(planted / "fingerprints"))
    assert table.read(["id"]).equals(fingerprints.read(["id"]))
    known = table.manifests()
    assert sum(one.rows_read for one in known.values()) == fingerprints.num_rows == 14
    assert not any(one.rejections for one in known.values())


def data_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.parquet")}


def test_the_same_bytes_whatever_the_order_and_the_size_of_groups(planted):
    wanted = data_files(Path(judge(planted, settings=EVERYTHING).url))
    for seed in range(1, 6):
        rows_at_once = random.Random(seed).choice([1, 3, 10, 100])
        settings = EVERYTHING.model_copy(update={"rows_at_once": rows_at_once})
        table = judge(planted, settings=settings, name=f"again-{seed}", read=read_shuffled(seed))
        assert data_files(Path(table.url)) == wanted


def test_a_chain_of_copies_loses_all_but_its_first(tmp_path):
    """B looks like A, C like B, and C not like A: B is earlier than C, though it is not kept itself."""
    chain = [encoded(photograph(3).crop((0, 0, 240 - 2 * n, 240))) for n in range(4)]
    write_shards(tmp_path / "shards", [[row(n, image=image) for n, image in enumerate(chain)]])
    assert refused(judge(tmp_path)) == {
        "001": ("near_duplicate_image", "000"),
        "002": ("near_duplicate_image", "001"),
        "003": ("near_duplicate_image", "001"),
    }


# ---- rounds


def test_appended_shards_lose_against_rows_that_are_there_and_verdicts_stay(tmp_path):
    write_shards(tmp_path / "shards", [[row(0), row(1)]], first=5)
    first = judge(tmp_path)
    before = data_files(Path(first.url))
    # A shard that sorts before the one that is judged, with its copies.
    write_shards(tmp_path / "shards", [[row(7), row(8, image=encoded(photograph(0))), row(7)]])
    second = judge(tmp_path)
    assert refused(second) == {"001": ("duplicate_image", "500"), "002": ("duplicate_url", "000")}
    assert [one["of"] for one in second.read().to_pylist() if one["of"]] == [
        "web/00005/0000500",
        "web/00000/0000000",
    ]
    assert {
        name: second_file for name, second_file in data_files(Path(second.url)).items() if name in before
    } == before
    assert [file.unit for file in second.units] == [
        "r000001-web-00005-000000-000002",
        "r000002-web-00000-000000-000003",
    ]


def test_a_round_with_nothing_new_does_nothing(planted):
    first = judge(planted)
    assert judge(planted).version == first.version


class Killed(BaseException):
    pass


def killed(*_args, **_kwargs):
    raise Killed


def test_killed_before_the_commit_a_round_makes_the_same_bytes_again(planted, monkeypatch):
    wanted = data_files(Path(judge(planted, name="whole").url))
    monkeypatch.setattr(duplicates, "commit_round", killed)
    with pytest.raises(Killed):
        judge(planted)
    assert data_files(planted / "duplicates") == wanted
    assert open_table(str(planted / "duplicates")).units == []
    monkeypatch.undo()
    table = judge(planted, read=read_shuffled(9))
    assert (refused(table), data_files(planted / "duplicates")) == (KINDS, wanted)


def test_files_of_a_dead_round_of_other_rows_never_count(tmp_path, monkeypatch):
    write_shards(tmp_path / "shards", [[row(0)]], first=5)
    monkeypatch.setattr(duplicates, "commit_round", killed)
    with pytest.raises(Killed):
        judge(tmp_path)
    monkeypatch.undo()
    # The same round is now of two shards, and the row that had no earlier one has one.
    write_shards(tmp_path / "shards", [[row(0)]])
    table = judge(tmp_path)
    assert [(one["id"], one["verdict"]) for one in table.read().to_pylist()] == [
        ("web/00000/0000000", None),
        ("web/00005/0000500", "duplicate_url"),
    ]
    assert len(data_files(tmp_path / "duplicates")) == 3


def test_killed_after_the_commit_a_round_gets_its_accounts_from_the_next_run(planted, monkeypatch):
    from pipelines.tables import commits

    def read_and_arrange(*given):
        monkeypatch.setattr(commits, "_commit_manifests", killed)
        return read_shuffled(0)(*given)

    with pytest.raises(Killed):
        judge(planted, read=read_and_arrange)
    monkeypatch.undo()
    assert open_table(str(planted / "duplicates")).manifests() == {}
    table = judge(planted)
    assert refused(table) == KINDS
    assert sorted(table.manifests()) == [file.unit for file in table.units]


def test_of_two_runs_that_judge_at_once_one_is_told_to_look_again(planted, monkeypatch):
    def overtaken(*args, **kwargs):
        monkeypatch.undo()
        judge(planted)
        return commit_round(*args, **kwargs)

    monkeypatch.setattr(duplicates, "commit_round", overtaken)
    with pytest.raises(TableError, match="another run has judged rows"):
        judge(planted)
    assert refused(judge(planted)) == KINDS


def test_a_round_is_committed_in_its_turn_only(planted):
    table = judge(planted)
    assert not commit_round(table.url, [], number=1)
    assert not commit_round(table.url, [], number=3)
    assert commit_units(table.url, []) == []


# ---- other tables, and other settings


def test_rows_of_other_runs_come_first(planted, tmp_path):
    other = tmp_path / "other"
    write_shards(other / "shards", [[row(3), row(106, url="")]])
    earlier = fingerprint_shards(
        SETTINGS,
        latents=LATENTS,
        shards=list_shards(str(other / "shards")),
        source="older",
        url=str(other / "fingerprints"),
        run=in_process,
    )
    table = judge(planted, against=[earlier])
    assert refused(table) == KINDS | {
        "003": ("duplicate_url", "000"),
        "106": ("duplicate_image", "001"),
    }
    with pytest.raises(TableError, match="against is"):
        judge(planted)


def test_other_settings_are_refused_by_name(planted):
    judge(planted)
    with pytest.raises(TableError, match="max_hamming is 4 there, 2 here"):
        judge(planted, settings=Deduplication(max_hamming=2))
    # How the work is cut decides no verdict.
    assert judge(planted, settings=Deduplication(use=True, rows_at_once=2)).version


def test_fingerprints_of_another_method_are_refused(planted, monkeypatch):
    monkeypatch.setattr(duplicates, "METHOD", {"keys": "others"})
    with pytest.raises(TableError, match="fingerprints of another kind"):
        judge(planted)


# ---- the evaluation


@pytest.fixture
def judged_by(planted) -> Snapshot:
    """A picture like row 4, a picture that is no row's, the caption of row 5; and shards with row 106."""
    folder = planted / "val2014"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(near_copies(4)["encoded again"])
    (folder / "b.jpg").write_bytes(encoded(photograph(500)))
    (planted / "captions.tsv").write_text("id\tcaption\n1\tPhotograph number 5.\n2\tno such thing\n")
    write_shards(planted / "held-out", [[row(106, caption="other words")]])
    return fingerprint_evaluation(
        SETTINGS,
        latents=LATENTS,
        evaluation=EvaluationSet(
            captions=(str(planted / "captions.tsv"),),
            pictures=(str(folder),),
            shards=(str(planted / "held-out"),),
        ),
        url=str(planted / "evaluation"),
        run=in_process,
    )


EVALUATED = {
    "004": ("evaluation_image", "jpg"),
    "005": ("evaluation_caption", "000"),
    "106": ("evaluation_image", "000"),
}


def test_what_is_in_the_evaluation_is_refused_whatever_else_counts(planted, judged_by):
    assert refused(judge(planted, evaluation=judged_by)) == KINDS | EVALUATED
    least = Deduplication(url=False, image=False, max_hamming=None)
    assert refused(judge(planted, settings=least, evaluation=judged_by, name="least")) == {
        "005": EVALUATED["005"],
        "106": EVALUATED["106"],
    }


def test_the_middle_square_of_an_evaluated_picture_is_refused_too(planted):
    wide = photograph(600).resize((360, 240))
    (planted / "val").mkdir()
    (planted / "val" / "a.jpg").write_bytes(encoded(wide))
    square = encoded(wide.crop((60, 0, 300, 240)).resize((128, 128)))
    write_shards(planted / "shards", [[row(200, image=square), row(201, image=encoded(wide))]], first=2)
    evaluation = fingerprint_evaluation(
        SETTINGS,
        latents=LATENTS,
        evaluation=EvaluationSet(pictures=(str(planted / "val"),)),
        url=str(planted / "evaluation"),
        run=in_process,
    )
    table = judge(planted, evaluation=evaluation)
    assert [one["of"] for one in table.read().to_pylist() if one["verdict"] == "evaluation_image"] == [
        "middle-of-evaluation-val/a.jpg",
        "evaluation-val/a.jpg",
    ]


def test_another_evaluation_wants_another_table(planted, judged_by):
    judge(planted, evaluation=judged_by)
    with pytest.raises(TableError, match="evaluation is"):
        judge(planted)


# ---- LATENTS


def encode(planted: Path, model: str, veto: DuplicateFilter, name: str = "latents") -> Snapshot:
    shards = list_shards(str(planted / "shards"))
    url = str(planted / name)
    return encode_latents(
        LATENTS, model=model, shards=shards, source="web", url=url, run=in_process, vetoes=[veto]
    )


def veto_of(table: Snapshot) -> DuplicateFilter:
    return DuplicateFilter(url=table.url, version=table.version, source="web")


def test_copies_and_what_is_in_the_evaluation_never_reach_latents(planted, judged_by, tiny_teacher):
    table = judge(planted, settings=EVERYTHING, evaluation=judged_by)
    latents = encode(planted, tiny_teacher, veto_of(table))
    kept = {id_[-3:] for id_ in latents.read(["id"]).column("id").to_pylist()}
    assert kept == {"000", "001", "002", "003"}
    found = {one["id"][-3:]: one["reason"] for one in latents.rejected_rows()}
    assert found == {id_: reason for id_, (reason, _) in (KINDS | CAPTIONS | EVALUATED).items()}
    assert {one["detail"] for one in latents.rejected_rows() if one["id"].endswith("101")} == {
        "of web/00000/0000001"
    }
    assert sum(one.rows_read for one in latents.manifests().values()) == 14


def test_latents_grow_with_rounds_and_are_refused_under_other_verdicts(planted, tiny_teacher):
    first = encode(planted, tiny_teacher, veto_of(judge(planted)))
    write_shards(planted / "shards", [[row(0), row(300)]], first=2)
    second = encode(planted, tiny_teacher, veto_of(judge(planted)))
    assert (first.num_rows, second.num_rows) == (8, 9)
    other = judge(planted, settings=EVERYTHING, name="other")
    with pytest.raises(TableError, match=r"duplicates\.caption is false there, true here"):
        encode(planted, tiny_teacher, veto_of(other))


def test_a_shard_without_verdicts_says_what_to_run(planted, tiny_teacher):
    veto = veto_of(judge(planted))
    write_shards(planted / "shards", [[row(300)]], first=2)
    with pytest.raises(TableError, match=r"no verdicts on all rows of .*00002.tar: run jobs.find_duplicates"):
        encode(planted, tiny_teacher, veto)


def test_verdicts_on_another_shard_of_the_name_are_refused(planted, tmp_path):
    veto = veto_of(judge(planted))
    write_shards(tmp_path / "others", [[row(900)]])
    (shard,) = list_shards(str(tmp_path / "others"))
    with pytest.raises(TableError, match="verdicts on another shard of the name 00000"):
        veto.on(shard)


# ---- Ray


@pytest.mark.ray
def test_ray_writes_the_bytes_that_one_process_writes(ray_cluster, planted, tmp_path):
    wanted = data_files(Path(judge(planted, settings=EVERYTHING, name="alone").url))
    few = EVERYTHING.model_copy(update={"rows_at_once": 20})
    # As units are streamed: a block of its own for each row.
    context = DataContext.get_current()
    context.target_max_block_size = 1
    strategy = context.shuffle_strategy
    table = judge(planted, settings=few, name="ray", read=read_on_ray)
    assert data_files(Path(table.url)) == wanted
    assert (context.target_max_block_size, context.shuffle_strategy) == (1, strategy)
    assert DataContext.get_current() is context
    # No copies at all, so groups of nothing.
    write_shards(tmp_path / "unlike" / "shards", [[row(n) for n in range(3)]])
    assert refused(judge(tmp_path / "unlike", read=read_on_ray)) == {}
