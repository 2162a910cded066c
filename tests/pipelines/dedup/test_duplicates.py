"""DUPLICATES: a copy of any kind loses against the row that came first, and never reaches LATENTS."""

import random
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import Mock

import pytest
from copy_inputs import LATENTS, encoded, evaluated, fingerprinted, near_copies, photograph, row, write_shards
from latent_inputs import data_files, encode
from ray.data import DataContext
from shuffled_rows import read_shuffled

from pipelines.dedup import duplicates
from pipelines.dedup.duplicates import count_verdicts, find_duplicates
from pipelines.dedup.settings import Deduplication, EvaluationSet
from pipelines.ray_data.shuffle import read_on_ray
from pipelines.sources.webdataset import list_shards
from pipelines.stages.duplicate_filter import DuplicateFilter
from pipelines.tables import commits
from pipelines.tables.commits import commit_round, commit_units
from pipelines.tables.table import Snapshot, TableError, open_table

DEFAULT = Deduplication()
EVERYTHING = Deduplication(caption=True)


def find(
    folder: Path, *, settings: Deduplication = DEFAULT, name: str = "duplicates", read=None, **more
) -> Snapshot:
    """A round over the fingerprints of `folder/shards`, which are completed first."""
    fingerprints = fingerprinted(folder / "shards", folder / "fingerprints")
    read = read or read_shuffled(0)
    return find_duplicates(settings, fingerprints=fingerprints, url=str(folder / name), read=read, **more)


def verdicts(table: Snapshot) -> dict[str, tuple[str, str]]:
    """Reason and first row of each duplicate, both rows by the end of their key."""
    return {
        record["id"][-3:]: (record["verdict"], record["of"].removeprefix("web/")[-3:])
        for record in table.read().to_pylist()
        if record["verdict"] is not None
    }


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two shards; rows of the second, and one of the first, copy rows of the first."""
    first = [*(row(n) for n in range(6)), row(6, caption="PHOTOGRAPH, number 4!")]
    second = [
        row(100, url="https://ORIGIN/0.jpg#top"),
        row(101, image=encoded(photograph(1))),
        *(row(102 + n, image=image) for n, image in enumerate(near_copies(2).values())),
        row(106),
    ]
    write_shards(tmp_path / "shards", [first, second])
    return tmp_path


VERDICTS = {
    "100": ("duplicate_url", "000"),
    "101": ("duplicate_image", "001"),
    **{f"10{n}": ("near_duplicate_image", "002") for n in range(2, 6)},
}
CAPTION_VERDICTS = {"006": ("duplicate_caption", "004")}


def test_duplicates_of_each_kind_are_found(folder):
    assert verdicts(find(folder)) == VERDICTS
    table = find(folder, settings=EVERYTHING, name="all")
    assert verdicts(table) == VERDICTS | CAPTION_VERDICTS
    counts = {"duplicate_url": 1, "duplicate_image": 1, "near_duplicate_image": 4, "duplicate_caption": 1}
    assert count_verdicts(table) == counts


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
def test_only_enabled_kinds_count(folder, settings, reasons):
    assert {reason for reason, _ in verdicts(find(folder, settings=settings)).values()} == reasons


def test_every_fingerprint_has_a_row(folder):
    table = find(folder)
    fingerprints = open_table(str(folder / "fingerprints"))
    assert table.read(["id"]).equals(fingerprints.read(["id"]))
    manifests = table.manifests().values()
    assert sum(manifest.rows_read for manifest in manifests) == fingerprints.num_rows == 14
    assert not any(manifest.rejections for manifest in manifests)


def test_bytes_do_not_depend_on_order_or_groups(folder):
    expected = data_files(find(folder, settings=EVERYTHING).url)
    for seed in range(1, 6):
        rows_at_once = random.Random(seed).choice([1, 3, 10, 100])
        settings = EVERYTHING.model_copy(update={"rows_at_once": rows_at_once})
        table = find(folder, settings=settings, name=f"again-{seed}", read=read_shuffled(seed))
        assert data_files(table.url) == expected


def test_chain_of_copies_keeps_its_first_alone(tmp_path):
    """B looks like A, C like B, and C not like A: B is earlier than C, though a duplicate itself."""
    chain = [encoded(photograph(3).crop((0, 0, 240 - 2 * n, 240))) for n in range(4)]
    write_shards(tmp_path / "shards", [[row(n, image=image) for n, image in enumerate(chain)]])
    assert verdicts(find(tmp_path)) == {
        "001": ("near_duplicate_image", "000"),
        "002": ("near_duplicate_image", "001"),
        "003": ("near_duplicate_image", "001"),
    }


# ---- rounds


def test_later_rounds_change_no_verdict(tmp_path):
    write_shards(tmp_path / "shards", [[row(0), row(1)]], first=5)
    before = data_files(find(tmp_path).url)
    # A shard that sorts before the first round's, with copies of its rows.
    write_shards(tmp_path / "shards", [[row(7), row(8, image=encoded(photograph(0))), row(7)]])
    second = find(tmp_path)
    assert verdicts(second) == {"001": ("duplicate_image", "500"), "002": ("duplicate_url", "000")}
    earlier = [record["of"] for record in second.read().to_pylist() if record["of"]]
    assert earlier == ["web/00005/0000500", "web/00000/0000000"]
    assert data_files(second.url).items() >= before.items()
    units = [file.unit for file in second.units]
    assert units == ["r000001-web-00005-000000-000002", "r000002-web-00000-000000-000003"]


def test_round_without_new_units_does_nothing(folder):
    assert find(folder).version == find(folder).version


class Killed(BaseException):
    pass


@contextmanager
def killed_at(module, function):
    """As if the process were killed where it would call this function."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, function, Mock(side_effect=Killed))
        with pytest.raises(Killed):
            yield


def test_round_killed_before_commit_is_repeated(folder):
    expected = data_files(find(folder, name="whole").url)
    with killed_at(duplicates, "commit_round"):
        find(folder)
    assert data_files(folder / "duplicates") == expected
    assert not open_table(str(folder / "duplicates")).units
    table = find(folder, read=read_shuffled(9))
    assert (verdicts(table), data_files(folder / "duplicates")) == (VERDICTS, expected)


def test_killed_round_of_other_rows_never_counts(tmp_path):
    write_shards(tmp_path / "shards", [[row(0)]], first=5)
    with killed_at(duplicates, "commit_round"):
        find(tmp_path)
    # The same round now has two shards, and the row that had no earlier copy has one.
    write_shards(tmp_path / "shards", [[row(0)]])
    found = {record["id"]: record["verdict"] for record in find(tmp_path).read().to_pylist()}
    assert found == {"web/00000/0000000": None, "web/00005/0000500": "duplicate_url"}
    assert len(data_files(tmp_path / "duplicates")) == 3


def test_manifests_of_a_killed_commit_are_restored(folder):
    url, fingerprints = str(folder / "duplicates"), fingerprinted(folder / "shards", folder / "fingerprints")
    with killed_at(commits, "_commit_manifests"):
        find_duplicates(DEFAULT, fingerprints=fingerprints, url=url, read=read_shuffled(0))
    assert open_table(url).manifests() == {}
    table = find(folder)
    assert verdicts(table) == VERDICTS
    assert sorted(table.manifests()) == [file.unit for file in table.units]


def test_overtaken_round_is_refused(folder, monkeypatch):
    def overtaken(*args, **kwargs):
        monkeypatch.undo()
        find(folder)
        return commit_round(*args, **kwargs)

    monkeypatch.setattr(duplicates, "commit_round", overtaken)
    with pytest.raises(TableError, match="another run has committed round 1"):
        find(folder)
    assert verdicts(find(folder)) == VERDICTS


def test_rounds_are_committed_in_order(folder):
    table = find(folder)
    assert not commit_round(table.url, [], number=1)
    assert not commit_round(table.url, [], number=3)
    commit_units(table.url, [])
    assert open_table(table.url).version == table.version


# ---- other tables, and other settings


def test_rows_of_other_tables_come_first(folder, tmp_path):
    other = tmp_path / "other"
    write_shards(other / "shards", [[row(3), row(106, url="")]])
    earlier = fingerprinted(other / "shards", other / "fingerprints", source="older")
    others = {"003": ("duplicate_url", "000"), "106": ("duplicate_image", "001")}
    assert verdicts(find(folder, against=[earlier])) == VERDICTS | others
    with pytest.raises(TableError, match="against is"):
        find(folder)


def test_other_settings_are_refused(folder):
    find(folder)
    with pytest.raises(TableError, match="max_hamming is 4 there, 2 here"):
        find(folder, settings=Deduplication(max_hamming=2))
    # Settings that change no verdict are accepted.
    assert find(folder, settings=Deduplication(use=True, rows_at_once=2)).version


def test_fingerprints_of_other_method_are_refused(folder, monkeypatch):
    monkeypatch.setattr(duplicates, "METHOD", {"keys": "others"})
    with pytest.raises(TableError, match="fingerprints of another method"):
        find(folder)


# ---- the evaluation


@pytest.fixture
def evaluation(folder) -> Snapshot:
    """An image like row 4, an image that is no row's, the caption of row 5, and shards with row 106."""
    (folder / "val2014").mkdir()
    (folder / "val2014" / "a.jpg").write_bytes(near_copies(4)["encoded again"])
    (folder / "val2014" / "b.jpg").write_bytes(encoded(photograph(500)))
    (folder / "captions.tsv").write_text("id\tcaption\n1\tPhotograph number 5.\n2\tno such thing\n")
    write_shards(folder / "held-out", [[row(106, caption="other words")]])
    parts = EvaluationSet(
        captions=(str(folder / "captions.tsv"),),
        images=(str(folder / "val2014"),),
        shards=(str(folder / "held-out"),),
    )
    return evaluated(parts, folder / "evaluation")


EVALUATION_VERDICTS = {
    "004": ("evaluation_image", "jpg"),
    "005": ("evaluation_caption", "000"),
    "106": ("evaluation_image", "000"),
}


def test_copies_of_the_evaluation_always_count(folder, evaluation):
    assert verdicts(find(folder, evaluation=evaluation)) == VERDICTS | EVALUATION_VERDICTS
    least = Deduplication(url=False, image=False, max_hamming=None)
    found = verdicts(find(folder, settings=least, evaluation=evaluation, name="least"))
    assert found == {id_: EVALUATION_VERDICTS[id_] for id_ in ("005", "106")}


def test_center_square_of_evaluation_image_counts(folder):
    wide = photograph(600).resize((360, 240))
    (folder / "val").mkdir()
    (folder / "val" / "a.jpg").write_bytes(encoded(wide))
    square = encoded(wide.crop((60, 0, 300, 240)).resize((128, 128)))
    write_shards(folder / "shards", [[row(200, image=square), row(201, image=encoded(wide))]], first=2)
    evaluation = evaluated(EvaluationSet(images=(str(folder / "val"),)), folder / "evaluation")
    records = find(folder, evaluation=evaluation).read().to_pylist()
    found = [record["of"] for record in records if record["verdict"] == "evaluation_image"]
    assert found == ["middle-of-evaluation-val/a.jpg", "evaluation-val/a.jpg"]


def test_other_evaluation_is_refused(folder, evaluation):
    find(folder, evaluation=evaluation)
    with pytest.raises(TableError, match="evaluation is"):
        find(folder)


# ---- LATENTS


def encode_unique(folder: Path, model: str, duplicate_filter: DuplicateFilter) -> Snapshot:
    return encode(folder / "latents", folder / "shards", model, settings=LATENTS, filters=[duplicate_filter])


def filter_of(table: Snapshot) -> DuplicateFilter:
    return DuplicateFilter(url=table.url, version=table.version, source="web")


def test_duplicates_never_reach_latents(folder, evaluation, tiny_teacher):
    table = find(folder, settings=EVERYTHING, evaluation=evaluation)
    latents = encode_unique(folder, tiny_teacher, filter_of(table))
    assert {id_[-3:] for id_ in latents.read(["id"]).column("id").to_pylist()} == {"000", "001", "002", "003"}
    rejected = {record["id"][-3:]: record for record in latents.rejected_rows()}
    expected = VERDICTS | CAPTION_VERDICTS | EVALUATION_VERDICTS
    assert rejected.keys() == expected.keys()
    assert all(rejected[id_]["reason"] == reason for id_, (reason, _) in expected.items())
    assert rejected["101"]["detail"] == "of web/00000/0000001"
    assert sum(manifest.rows_read for manifest in latents.manifests().values()) == 14


def test_latents_grow_with_rounds(folder, tiny_teacher):
    first = encode_unique(folder, tiny_teacher, filter_of(find(folder)))
    write_shards(folder / "shards", [[row(0), row(300)]], first=2)
    second = encode_unique(folder, tiny_teacher, filter_of(find(folder)))
    assert (first.num_rows, second.num_rows) == (8, 9)
    other = find(folder, settings=EVERYTHING, name="other")
    with pytest.raises(TableError, match=r"duplicates\.caption is false there, true here"):
        encode_unique(folder, tiny_teacher, filter_of(other))


def test_shard_without_verdicts_is_refused(folder, tiny_teacher):
    duplicate_filter = filter_of(find(folder))
    write_shards(folder / "shards", [[row(300)]], first=2)
    with pytest.raises(TableError, match=r"00002.tar: run jobs.find_duplicates"):
        encode_unique(folder, tiny_teacher, duplicate_filter)


def test_verdicts_on_other_shard_are_refused(folder, tmp_path):
    duplicate_filter = filter_of(find(folder))
    write_shards(tmp_path / "others", [[row(900)]])
    (shard,) = list_shards(str(tmp_path / "others"))
    with pytest.raises(TableError, match="another shard of the name 00000"):
        duplicate_filter.for_shard(shard)


# ---- Ray


# In CI test_targets does so with TARGETS.
@pytest.mark.slow
@pytest.mark.ray
def test_ray_writes_equal_bytes(ray_cluster, folder, tmp_path):
    expected = data_files(find(folder, settings=EVERYTHING, name="alone").url)
    few = EVERYTHING.model_copy(update={"rows_at_once": 20})
    # As units are streamed: a block of its own for each row.
    context = DataContext.get_current()
    context.target_max_block_size = 1
    strategy = context.shuffle_strategy
    assert data_files(find(folder, settings=few, name="ray", read=read_on_ray).url) == expected
    assert (context.target_max_block_size, context.shuffle_strategy) == (1, strategy)
    assert DataContext.get_current() is context
    # No duplicates at all, so empty groups.
    write_shards(tmp_path / "unlike" / "shards", [[row(n) for n in range(3)]])
    assert verdicts(find(tmp_path / "unlike", read=read_on_ray)) == {}
