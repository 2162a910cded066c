"""FINGERPRINTS: what two copies have in common, what two others do not, for every usable row once."""

from __future__ import annotations

import hashlib
import io

import imagehash
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
from PIL import Image

from pipelines.dedup.decontamination import fingerprint_evaluation
from pipelines.dedup.fingerprints import recomputer
from pipelines.dedup.settings import EvaluationSet
from pipelines.rejections import Rejected
from pipelines.sources import SourceError
from pipelines.sources.webdataset import list_shards
from pipelines.stages.fingerprint import caption_key, phash, url_key
from pipelines.stages.settings import ImageBounds
from pipelines.tables.table import TableError
from pipelines.tables.verification import verify_table
from snapfusion.settings import SettingsError

BOUNDS = ImageBounds(min_side=8)


@pytest.mark.parametrize(
    "other",
    [
        "A cat, on the MAT!",
        "  a cat on\tthe mat ",
        "Ａ ｃａｔ — on “the” mat…",
        "a cat_on_the_mat",
    ],
)
def test_captions_that_differ_in_case_and_punctuation_are_one(other):
    assert caption_key(other) == caption_key("a cat on the mat")


def test_captions_that_differ_in_a_letter_a_mark_or_a_digit_are_two():
    different = [
        "a cat on the mat",
        "a cat on the mats",
        "cafe",
        "café",
        "कि",
        "का",
        "2 cats",
        "3 cats",
        "猫",
    ]
    assert len({caption_key(caption) for caption in different}) == len(different)
    assert caption_key("STRASSE") == caption_key("straße")


def test_a_caption_without_letters_has_no_key():
    assert caption_key("!!! ❤ ...") is None


@pytest.mark.parametrize(
    "other", ["https://Host.org/a.jpg?b=1", "http://host.org/a.jpg?b=1#top", " http://host.org/a.jpg?b=1 "]
)
def test_spellings_of_an_address_are_one(other):
    assert url_key(other) == url_key("http://host.org/a.jpg?b=1")


def test_addresses_are_two_if_path_or_query_differ_and_none_is_too_odd():
    different = ["http://h/a", "http://h/A", "http://h/a?b", "http://h/a?b=2", "http://[h/a", "", "\ud800"]
    assert len({url_key(url) for url in different}) == len(different)


def test_the_perceptual_hash_is_that_of_the_library_and_keeps_its_sign():
    for n in range(20):
        data = encoded(photograph(n))
        with Image.open(io.BytesIO(data)) as image:
            spelled = str(imagehash.phash(image))
        assert f"{phash(data, images=BOUNDS) & (2**64 - 1):016x}" == spelled
        assert -(2**63) <= phash(data, images=BOUNDS) < 2**63


def test_near_copies_are_near_and_others_are_far():
    hashes = [phash(encoded(photograph(n)), images=BOUNDS) for n in range(40)]
    for n in range(6):
        for kind, copy in near_copies(n).items():
            assert distance(phash(copy, images=BOUNDS), hashes[n]) <= 4, kind
    assert min(distance(a, b) for i, a in enumerate(hashes) for b in hashes[:i]) > 8


def distance(one: int, other: int) -> int:
    return ((one ^ other) & (2**64 - 1)).bit_count()


def test_a_picture_without_detail_has_the_hash_of_its_mean_alone():
    plain = Image.new("RGB", (64, 48), (120, 3, 9))
    assert phash(encoded(plain), images=BOUNDS) == -(2**63)


def test_what_is_no_picture_has_no_hash():
    with pytest.raises(Rejected, match="not_an_image"):
        phash(b"this is text", images=BOUNDS)


@pytest.fixture
def folder(tmp_path):
    write_shards(
        tmp_path / "shards",
        [[row(n, image=b"this is text" if n == 3 else None) for n in range(7)], [row(100), row(101, url="")]],
    )
    return tmp_path / "shards"


def test_every_usable_row_has_a_fingerprint_and_the_others_are_accounted(folder, tmp_path):
    table = fingerprinted(folder, tmp_path / "f", run=in_process)
    rows = table.read().to_pylist()
    assert [one["id"] for one in rows] == [
        *(f"web/00000/00000{n:02d}" for n in (0, 1, 2, 4, 5, 6)),
        "web/00001/0000100",
        "web/00001/0000101",
    ]
    assert rows[0] == {
        "id": "web/00000/0000000",
        "source_id": "http://origin/0.jpg",
        "url_key": url_key("http://origin/0.jpg"),
        "caption_key": caption_key("photograph number 0"),
        "image_sha256": hashlib.sha256(encoded(photograph(0))).hexdigest(),
        "phash": phash(encoded(photograph(0)), images=BOUNDS),
    }
    assert rows[-1]["url_key"] is None
    assert [one["reason"] for one in table.rejected_rows()] == ["not_an_image"]
    assert sum(account.rows_read for account in table.manifests().values()) == 9


def test_what_latents_would_reject_has_no_fingerprint(folder, tmp_path):
    wanted = LATENTS.with_values(["selection.min_caption_chars=21"])
    table = fingerprinted(folder, tmp_path / "f", run=in_process, latents=wanted)
    assert table.num_rows == 2
    with pytest.raises(TableError, match=r"selection.min_caption_chars is 21 there, null here"):
        fingerprinted(folder, tmp_path / "f", run=in_process)


def test_what_becomes_of_pictures_in_latents_is_no_concern_of_fingerprints(folder, tmp_path):
    fingerprinted(folder, tmp_path / "f", run=in_process)
    other = LATENTS.with_values(["images.crop=top", "rows_per_unit=64", "encoding.batch_size=2"])
    assert fingerprinted(folder, tmp_path / "f", run=in_process, latents=other).num_rows == 8


def test_a_shard_that_was_half_read_is_gone_on_with_and_new_ones_are_appended(folder, tmp_path):
    whole = fingerprinted(folder, tmp_path / "whole", run=in_process)

    def first_unit_only(items, stages):
        yield next(in_process(items, stages))

    part = fingerprinted(folder, tmp_path / "f", run=first_unit_only)
    assert [unit.unit for unit in part.units] == ["web-00000-000000-000005"]
    assert fingerprinted(folder, tmp_path / "f", run=in_process).read().equals(whole.read())
    write_shards(folder, [[row(200)]], first=2)
    assert fingerprinted(folder, tmp_path / "f", run=in_process).num_rows == 9


def test_a_picture_that_kills_its_process_is_set_aside(folder, tmp_path):
    from poison import LooksKilledBy, poison_of

    from pipelines.datasets.latents import pending_shards
    from pipelines.stages.fingerprint import FingerprintShard

    [work, *_] = pending_shards(list_shards(str(folder)), source="web", accounts=[])
    stage = FingerprintShard(
        rows_per_unit=100, shards=LATENTS.shards, images=BOUNDS, selection=LATENTS.selection
    )
    stage.decode = LooksKilledBy(poison_of(encoded(photograph(1))), size=16)
    (unit,) = stage.isolated(work)
    assert [(one.id, one.reason) for one in unit.rejections] == [
        ("web/00000/0000001", "crashed"),
        ("web/00000/0000003", "not_an_image"),
    ]


def test_fingerprints_are_made_again_from_their_shards(folder, tmp_path):
    table = fingerprinted(folder, tmp_path / "f", run=in_process)
    made = recomputer(table, shards=list_shards(str(folder)), source="web")
    found = verify_table(table, recompute=made, units=99, seed=0)
    assert (found.recomputed, found.exact, found.faults, found.notes) == (3, 3, (), ())


@pytest.fixture
def judged_by(tmp_path) -> EvaluationSet:
    (tmp_path / "val2014").mkdir()
    for n in (1, 2):
        (tmp_path / "val2014" / f"{n}.jpg").write_bytes(encoded(photograph(n)))
    (tmp_path / "captions.txt").write_text("one thing\n\nanother thing\n")
    write_shards(tmp_path / "held-out", [[row(7)]])
    return EvaluationSet(
        captions=(str(tmp_path / "captions.txt"),),
        pictures=(str(tmp_path / "val2014"),),
        shards=(str(tmp_path / "held-out"),),
    )


def evaluated(evaluation, tmp_path):
    return fingerprint_evaluation(
        SETTINGS, latents=LATENTS, evaluation=evaluation, url=str(tmp_path / "e"), run=in_process
    )


def test_captions_pictures_and_shards_of_an_evaluation_are_rows(judged_by, tmp_path):
    table = evaluated(judged_by, tmp_path)
    rows = {one["id"]: one for one in table.read().to_pylist()}
    assert {
        id_: [name for name, value in one.items() if value is not None][2:] for id_, one in rows.items()
    } == {
        "evaluation-captions.txt/000000000": ["caption_key"],
        "evaluation-captions.txt/000000002": ["caption_key"],
        "evaluation-val2014/1.jpg": ["image_sha256", "phash"],
        "evaluation-val2014/2.jpg": ["image_sha256", "phash"],
        "middle-of-evaluation-val2014/1.jpg": ["phash"],
        "middle-of-evaluation-val2014/2.jpg": ["phash"],
        "evaluation-held-out/00000/0000000": ["url_key", "caption_key", "image_sha256", "phash"],
    }
    assert [one["reason"] for one in table.rejected_rows()] == ["empty_caption"]
    assert evaluated(judged_by, tmp_path).version == table.version


def test_another_picture_under_the_same_name_is_refused(judged_by, tmp_path):
    evaluated(judged_by, tmp_path)
    (tmp_path / "val2014" / "2.jpg").write_bytes(encoded(photograph(3)))
    with pytest.raises(TableError, match="made of other pictures than"):
        evaluated(judged_by, tmp_path)


def test_an_evaluation_that_is_not_there_or_has_two_of_one_name_is_refused(judged_by, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="no pictures at"):
        evaluated(judged_by.model_copy(update={"pictures": (str(tmp_path / "empty"),)}), tmp_path)
    twice = EvaluationSet(captions=("a/captions.txt", "b/captions.txt"))
    with pytest.raises(SettingsError, match="two parts of the evaluation are called"):
        evaluated(twice, tmp_path)
