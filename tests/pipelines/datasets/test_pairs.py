"""PAIRS: images are a function of caption, draw and settings, and can be recomputed."""

import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_bundle
from in_process import in_process
from latent_inputs import copy_table, data_files, forge, verify
from pair_inputs import CAPTIONS, SETTINGS
from table_damage import edit_rows

from pipelines.datasets.pairs import captions_of, generate_pairs, pending_units, recomputer
from pipelines.rejections import Rejected
from pipelines.sources.captions import Caption
from pipelines.stages.generate import teacher_images
from pipelines.tables.commits import read_written_unit
from pipelines.tables.committer import CommitProgress
from pipelines.tables.schemas import from_png, read_array
from pipelines.tables.table import TableError, open_table
from snapfusion.models.load import load
from snapfusion.models.save import save
from snapfusion.noise import gaussian_batch
from snapfusion.sampling import sample, time_grid


def generate(url: Path | str, teacher: str, *, settings=SETTINGS, captions=CAPTIONS):
    return generate_pairs(
        settings, teacher=teacher, captions=captions, source="list", url=str(url), run=in_process
    )


@pytest.fixture(scope="module")
def pairs(tiny_teacher, tmp_path_factory):
    return generate(tmp_path_factory.mktemp("pairs") / "pairs", tiny_teacher)


def test_latent_is_sampled_from_the_rows_noise(pairs, tiny_teacher):
    rows = pairs.read_unit(pairs.units[0]).slice(0, 3)
    bundle = load(tiny_teacher)
    with torch.inference_mode():
        c = bundle.encode_text(bundle.tokenize(rows.column("caption").to_pylist()))
        eps = gaussian_batch(rows.column("noise_key").to_pylist(), bundle.latent_shape)
        expected = sample(bundle.denoiser(c, w=2.0), eps, grid=time_grid(4), schedule=bundle.schedule)
    np.testing.assert_array_equal(read_array(rows, "latent"), expected.half().numpy())


def test_image_is_decoded_from_the_stored_latent(pairs, tiny_teacher):
    rows = pairs.read_unit(pairs.units[-1])
    expected = teacher_images(load(tiny_teacher), torch.from_numpy(read_array(rows, "latent").copy()))
    stored = np.stack([from_png(image) for image in rows.column("image").to_pylist()])
    np.testing.assert_array_equal(stored, expected)


def test_networks_seconds_are_those_between_first_and_last_units(tiny_teacher, tmp_path):
    def with_pauses(items, stages):
        for unit in in_process(items, stages):
            yield unit
            time.sleep(0.5)

    reports: list[CommitProgress] = []
    table = generate_pairs(
        SETTINGS,
        teacher=tiny_teacher,
        captions=CAPTIONS,
        source="list",
        url=str(tmp_path / "pairs"),
        run=with_pauses,
        on_progress=reports.append,
    )
    seconds = sum(record.seconds for record in table.unit_records())
    (worker,) = reports[-1].network_time.workers.values()
    assert (worker.units, worker.computing) == (3, pytest.approx(seconds))
    assert worker.last - worker.first - seconds >= 2 * 0.5  # pauses between three units
    assert reports[-1].network_time.busy_share == pytest.approx(seconds / (worker.last - worker.first))
    assert reports[0].network_time.busy_share is None


def test_two_runs_write_the_same_bytes(pairs, tiny_teacher, tmp_path):
    assert data_files(generate(tmp_path / "pairs", tiny_teacher).url) == data_files(pairs.url)


@pytest.fixture
def copy(pairs, tmp_path):
    """A copy of the table that a test may change."""
    return copy_table(pairs, tmp_path / "pairs")


def test_more_draws_add_units_and_change_none(copy, tiny_teacher):
    before = data_files(copy)
    more = generate(copy, tiny_teacher, settings=SETTINGS.with_values(["draws=2"]))
    assert more.num_rows == 20
    assert data_files(copy).items() >= before.items()
    latents = more.read(["source_id", "latent"]).to_pydict()
    different = set(zip(latents["source_id"], latents["latent"], strict=True))
    assert set(Counter(source_id for source_id, _ in different).values()) == {2}


@pytest.mark.parametrize(("bad", "good"), [([1], ["c0#0", "c2#0", "c3#0"]), ([0, 1, 2, 3], [])])
def test_rejected_captions_are_counted_and_others_generated(tiny_teacher, tmp_path, bad, good):
    captions = list(CAPTIONS[:4])
    for n in bad:
        captions[n] = Rejected("empty_caption").record(id=f"c{n}", source="list.txt", ordinal=n)
    table = generate(tmp_path / "pairs", tiny_teacher, captions=captions)
    [manifest] = table.manifests().values()
    assert (manifest.rows_read, manifest.rows_written) == (4, len(good))
    assert manifest.rejected() == {"empty_caption": len(bad)}
    assert [row for file in table.units for row in table.read_unit(file)["id"].to_pylist()] == good


def test_rows_that_are_not_finite_are_rejected(tiny_teacher, tmp_path, monkeypatch):
    def poisoned(self, token_ids, keys):
        latents = torch.zeros(len(keys), *self.bundle.latent_shape, dtype=torch.float16)
        latents[0, 0, 0, 0] = float("nan")
        return latents, np.zeros((len(keys), 16, 16, 3), np.uint8)

    monkeypatch.setattr("pipelines.stages.generate.GeneratePairs.generate_batch", poisoned)
    table = generate(tmp_path / "pairs", tiny_teacher, captions=CAPTIONS[:4])
    manifest = table.manifests()[table.units[0].unit]
    assert manifest.rejected() == {"not_finite": 2}  # the first of each batch of three
    assert table.num_rows == 2


def test_crashed_unit_rejects_all_its_rows():
    [item, *_] = pending_units(SETTINGS, [], captions=CAPTIONS, source="list")
    finished = item.reject_all(["id", "latent"])
    assert [rejection.reason for rejection in finished.rejections] == ["crashed"] * 4
    assert finished.columns == {"id": [], "latent": []}


def test_other_teacher_is_refused(pairs, tmp_path):
    save(tiny_bundle(seed=1), tmp_path / "other")
    with pytest.raises(TableError, match=r"model\.weights\.text_encoder is"):
        generate(pairs.url, str(tmp_path / "other"))
    with pytest.raises(TableError, match="another teacher"):
        verified(pairs.url, str(tmp_path / "other"))


def test_other_guidance_is_refused(pairs, tiny_teacher):
    with pytest.raises(TableError, match=r"generation\.guidance is 2\.0 there, 3\.0 here"):
        generate(pairs.url, tiny_teacher, settings=SETTINGS.with_values(["generation.guidance=3.0"]))


def test_other_captions_of_the_name_are_refused(pairs, tiny_teacher):
    changed = [Caption(id="c0", ordinal=0, text="something else"), *CAPTIONS[1:]]
    with pytest.raises(TableError, match=r"other rows than 0 \.\. 4"):
        generate(pairs.url, tiny_teacher, captions=changed)


def test_captions_come_from_a_table_in_order(pairs):
    captions = captions_of(pairs, limit=5)
    assert [(caption.id, caption.ordinal) for caption in captions] == [(f"c{n}#0", n) for n in range(5)]


def verified(url: Path | str, teacher: str, *, units: int = 99):
    table = open_table(str(url))
    return verify(table, recomputer(table, teacher=teacher), units=units)


def test_units_are_recomputed_bit_for_bit(pairs, tiny_teacher):
    found = verified(pairs.url, tiny_teacher)
    assert (found.units, found.rows, found.recomputed, found.exact, found.faults) == (3, 10, 3, 3, ())


def first_file(url: Path) -> Path:
    return min(url.glob("*.parquet"))


def test_changed_file_is_found_by_its_hash(copy, tiny_teacher):
    forge(first_file(copy), column="latent")
    [fault] = verified(copy, tiny_teacher, units=0).faults
    assert "not the file that was committed" in fault


def test_forged_row_is_found_by_recomputing(copy, tiny_teacher):
    path = first_file(copy)
    size = path.stat().st_size
    forge(path, column="latent")
    # The forger has also put the new size into the log and the new hash into the units table: only
    # recomputing finds the rows.
    forged = read_written_unit(str(path))
    for entry in (copy / "_delta_log").glob("*.json"):
        entry.write_text(entry.read_text().replace(f'"size":{size}', f'"size":{forged.size}'))
    recorded = {"bytes": forged.size, "sha256": forged.sha256}
    edit_rows(f"{copy}.units", lambda row: row | (recorded if row["unit"] == forged.manifest.unit else {}))
    assert verified(copy, tiny_teacher, units=0).faults == ()
    assert [fault.split(":")[0] for fault in verified(copy, tiny_teacher).faults] == ["row c0#0", "row c1#0"]


def test_missing_file_is_found(copy, tiny_teacher):
    first_file(copy).unlink()
    assert any("cannot be read" in fault for fault in verified(copy, tiny_teacher).faults)
