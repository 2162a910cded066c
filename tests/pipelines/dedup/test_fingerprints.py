"""FINGERPRINTS: duplicates have equal or near keys, other rows do not; every usable row has one."""

import hashlib
import io

import imagehash
import pytest
from copy_inputs import LATENTS, encoded, evaluated, fingerprinted, near_copies, photograph, row, write_shards
from in_process import in_process
from latent_inputs import verify
from PIL import Image
from poison import LooksKilledBy, poison_of

from pipelines.datasets.shard_plan import pending_shards
from pipelines.dedup.fingerprints import recomputer
from pipelines.dedup.settings import EvaluationSet
from pipelines.rejections import Rejected
from pipelines.sources import SourceError
from pipelines.sources.webdataset import list_shards
from pipelines.stages.fingerprint import FingerprintShard, caption_key, phash, url_key
from pipelines.stages.settings import ImageBounds
from pipelines.tables.table import TableError
from snapfusion.settings import SettingsError

BOUNDS = ImageBounds(min_side=8)
CAPTIONS = ["a cat on the mat", "a cat on the mats", "cafe", "café", "कि", "का", "2 cats", "3 cats", "猫"]
URLS = ["http://h/a", "http://h/A", "http://h/a?b", "http://h/a?b=2", "http://[h/a", "", "\ud800"]


@pytest.mark.parametrize(
    ("key", "one", "other"),
    [
        (caption_key, "a cat on the mat", "A cat, on the MAT!"),
        (caption_key, "a cat on the mat", "  a cat on\tthe mat "),
        (caption_key, "a cat on the mat", "Ａ ｃａｔ — on “the” mat…"),
        (caption_key, "a cat on the mat", "a cat_on_the_mat"),
        (caption_key, "STRASSE", "straße"),
        (url_key, "http://host.org/a.jpg?b=1", "https://Host.org/a.jpg?b=1"),
        (url_key, "http://host.org/a.jpg?b=1", "http://host.org/a.jpg?b=1#top"),
        (url_key, "http://host.org/a.jpg?b=1", " http://host.org/a.jpg?b=1 "),
    ],
)
def test_spellings_have_one_key(key, one, other):
    assert key(one) == key(other)


@pytest.mark.parametrize(("key", "texts"), [(caption_key, CAPTIONS), (url_key, URLS)])
def test_different_texts_have_different_keys(key, texts):
    assert len(set(map(key, texts))) == len(texts)


def test_caption_without_letters_has_no_key():
    assert caption_key("!!! ❤ ...") is None


def test_phash_is_the_librarys_with_a_sign():
    for n in range(20):
        data = encoded(photograph(n))
        with Image.open(io.BytesIO(data)) as image:
            expected = str(imagehash.phash(image))
        value = phash(data, images=BOUNDS)
        assert f"{value & (2**64 - 1):016x}" == expected
        assert -(2**63) <= value < 2**63


def test_near_copies_have_near_phashes():
    hashes = [phash(encoded(photograph(n)), images=BOUNDS) for n in range(40)]
    for n in range(6):
        for kind, copy in near_copies(n).items():
            assert distance(phash(copy, images=BOUNDS), hashes[n]) <= 4, kind
    assert min(distance(a, b) for i, a in enumerate(hashes) for b in hashes[:i]) > 8


def distance(one: int, other: int) -> int:
    return ((one ^ other) & (2**64 - 1)).bit_count()


def test_phash_of_plain_image_is_its_mean_alone():
    assert phash(encoded(Image.new("RGB", (64, 48), (120, 3, 9))), images=BOUNDS) == -(2**63)


def test_broken_image_has_no_phash():
    with pytest.raises(Rejected, match="not_an_image"):
        phash(b"this is text", images=BOUNDS)


@pytest.fixture
def folder(tmp_path):
    first = [row(n, image=b"this is text" if n == 3 else None) for n in range(7)]
    write_shards(tmp_path / "shards", [first, [row(100), row(101, url="")]])
    return tmp_path / "shards"


def test_every_row_is_fingerprinted_or_rejected(folder, tmp_path):
    table = fingerprinted(folder, tmp_path / "f")
    rows = table.read().to_pylist()
    first = [f"web/00000/00000{n:02d}" for n in (0, 1, 2, 4, 5, 6)]
    assert [row["id"] for row in rows] == [*first, "web/00001/0000100", "web/00001/0000101"]
    image = encoded(photograph(0))
    assert rows[0] == {
        "id": "web/00000/0000000",
        "source_id": "http://origin/0.jpg",
        "url_key": url_key("http://origin/0.jpg"),
        "caption_key": caption_key("photograph number 0"),
        "image_sha256": hashlib.sha256(image).hexdigest(),
        "phash": phash(image, images=BOUNDS),
    }
    assert rows[-1]["url_key"] is None
    assert [rejected["reason"] for rejected in table.rejected_rows()] == ["not_an_image"]
    assert sum(manifest.rows_read for manifest in table.manifests().values()) == 9


def test_rows_that_latents_reject_have_no_fingerprint(folder, tmp_path):
    selected = LATENTS.with_values(["selection.min_caption_chars=21"])
    assert fingerprinted(folder, tmp_path / "f", latents=selected).num_rows == 2
    with pytest.raises(TableError, match=r"selection.min_caption_chars is 21 there, null here"):
        fingerprinted(folder, tmp_path / "f")


def test_crop_settings_do_not_change_fingerprints(folder, tmp_path):
    fingerprinted(folder, tmp_path / "f")
    other = LATENTS.with_values(["images.crop=top", "rows_per_unit=64", "encoding.batch_size=2"])
    assert fingerprinted(folder, tmp_path / "f", latents=other).num_rows == 8


def test_stopped_run_is_completed_and_shards_appended(folder, tmp_path):
    whole = fingerprinted(folder, tmp_path / "whole")

    def first_unit_only(items, stages):
        yield next(in_process(items, stages))

    part = fingerprinted(folder, tmp_path / "f", run=first_unit_only)
    assert [unit.unit for unit in part.units] == ["web-00000-000000-000005"]
    assert fingerprinted(folder, tmp_path / "f").read().equals(whole.read())
    write_shards(folder, [[row(200)]], first=2)
    assert fingerprinted(folder, tmp_path / "f").num_rows == 9


@pytest.mark.slow
def test_image_that_kills_its_process_is_rejected_alone(folder):
    [work, *_] = pending_shards(list_shards(str(folder)), [], source="web")
    options = {"shards": LATENTS.shards, "selection": LATENTS.selection}
    stage = FingerprintShard(rows_per_unit=100, images=BOUNDS, **options)
    stage.decode = LooksKilledBy(poison_of(encoded(photograph(1))), size=16)
    (unit,) = stage.isolated(work)
    reasons = {rejection.id: rejection.reason for rejection in unit.rejections}
    assert reasons == {"web/00000/0000001": "crashed", "web/00000/0000003": "not_an_image"}


def test_units_are_recomputed_from_shards(folder, tmp_path):
    table = fingerprinted(folder, tmp_path / "f")
    found = verify(table, recomputer(table, shards=list_shards(str(folder)), source="web"))
    assert (found.recomputed, found.exact, found.faults, found.notes) == (3, 3, (), ())


@pytest.fixture
def evaluation(tmp_path) -> EvaluationSet:
    (tmp_path / "val2014").mkdir()
    for n in (1, 2):
        (tmp_path / "val2014" / f"{n}.jpg").write_bytes(encoded(photograph(n)))
    (tmp_path / "captions.txt").write_text("one thing\n\nanother thing\n")
    write_shards(tmp_path / "held-out", [[row(7)]])
    return EvaluationSet(
        captions=(str(tmp_path / "captions.txt"),),
        images=(str(tmp_path / "val2014"),),
        shards=(str(tmp_path / "held-out"),),
    )


def test_evaluation_set_is_fingerprinted(evaluation, tmp_path):
    table = evaluated(evaluation, tmp_path / "e")
    columns = {
        fingerprint["id"]: [name for name, value in fingerprint.items() if value is not None][2:]
        for fingerprint in table.read().to_pylist()
    }
    assert columns == {
        "evaluation-captions.txt/000000000": ["caption_key"],
        "evaluation-captions.txt/000000002": ["caption_key"],
        "evaluation-val2014/1.jpg": ["image_sha256", "phash"],
        "evaluation-val2014/2.jpg": ["image_sha256", "phash"],
        "middle-of-evaluation-val2014/1.jpg": ["phash"],
        "middle-of-evaluation-val2014/2.jpg": ["phash"],
        "evaluation-held-out/00000/0000000": ["url_key", "caption_key", "image_sha256", "phash"],
    }
    assert [rejected["reason"] for rejected in table.rejected_rows()] == ["empty_caption"]
    assert evaluated(evaluation, tmp_path / "e").version == table.version


def test_other_image_of_the_name_is_refused(evaluation, tmp_path):
    evaluated(evaluation, tmp_path / "e")
    (tmp_path / "val2014" / "2.jpg").write_bytes(encoded(photograph(3)))
    with pytest.raises(TableError, match="made from other rows"):
        evaluated(evaluation, tmp_path / "e")


def test_missing_or_ambiguous_evaluation_is_refused(evaluation, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="no images at"):
        evaluated(evaluation.model_copy(update={"images": (str(tmp_path / "empty"),)}), tmp_path / "e")
    twice = EvaluationSet(captions=("a/captions.txt", "b/captions.txt"))
    with pytest.raises(SettingsError, match=r"'evaluation-captions\.txt'"):
        evaluated(twice, tmp_path / "e")
