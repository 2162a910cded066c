"""PAIRS: what the teacher draws is a function of caption, draw and settings, and can be made again."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import tiny_bundle
from in_process import in_process
from pair_inputs import CAPTIONS, SETTINGS

from pipelines.datasets.pairs import captions_of, generate_pairs, pending_units, recomputer, set_aside
from pipelines.rejections import Rejected
from pipelines.sources.captions import Caption
from pipelines.stages.generate import teacher_images
from pipelines.tables.commits import read_written_unit
from pipelines.tables.manifest import read_manifest, to_parquet
from pipelines.tables.schemas import array_type, from_png
from pipelines.tables.table import Snapshot, TableError, open_table
from pipelines.tables.verification import verify_table
from snapfusion.models.load import load
from snapfusion.models.save import save
from snapfusion.noise import gaussian_batch
from snapfusion.sampling import sample, time_grid


def generate(url: Path, teacher: str, *, settings=SETTINGS, captions=CAPTIONS):
    return generate_pairs(
        settings, teacher=teacher, captions=captions, source="list", url=str(url), run=in_process
    )


def data_files(url: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(url.glob("*.parquet"))}


@pytest.fixture(scope="module")
def pairs(tiny_teacher, tmp_path_factory):
    return generate(tmp_path_factory.mktemp("pairs") / "pairs", tiny_teacher)


def test_a_latent_is_what_the_teacher_samples_from_the_rows_noise(pairs, tiny_teacher):
    unit = pairs.read_unit(pairs.units[0])
    bundle = load(tiny_teacher)
    keys, texts = unit.column("noise_key").to_pylist()[:3], unit.column("caption").to_pylist()[:3]
    with torch.inference_mode():
        denoiser = bundle.denoiser(bundle.encode_text(bundle.tokenize(texts)), w=2.0)
        expected = sample(
            denoiser,
            gaussian_batch(keys, bundle.latent_shape),
            grid=time_grid(4),
            schedule=bundle.schedule,
        )
    field = unit.schema.field("latent")
    stored = array_type(field).unpack(unit.column("latent").to_pylist()[:3])
    np.testing.assert_array_equal(stored, expected.half().numpy())


def test_an_image_is_the_teachers_decode_of_the_latent_as_stored(pairs, tiny_teacher):
    unit = pairs.read_unit(pairs.units[-1])
    latents = array_type(unit.schema.field("latent")).unpack(unit.column("latent").to_pylist())
    expected = teacher_images(load(tiny_teacher), torch.from_numpy(latents.copy()))
    stored = np.stack([from_png(image) for image in unit.column("image").to_pylist()])
    np.testing.assert_array_equal(stored, expected)


def test_two_runs_write_the_same_bytes(pairs, tiny_teacher, tmp_path):
    again = generate(tmp_path / "pairs", tiny_teacher)
    assert data_files(Path(again.url)) == data_files(Path(pairs.url))


def test_more_draws_add_units_and_change_none(pairs, tiny_teacher, tmp_path):
    url = tmp_path / "pairs"
    shutil.copytree(pairs.url, url)
    for sibling in ("rejects", "units"):
        shutil.copytree(f"{pairs.url}.{sibling}", f"{url}.{sibling}")
    before = data_files(url)
    more = generate(url, tiny_teacher, settings=SETTINGS.with_values(["draws=2"]))
    assert more.num_rows == 20
    assert {name: data_files(url)[name] for name in before} == before
    latents = more.read(["source_id", "latent"]).to_pydict()
    by_caption: dict[str, set[bytes]] = {}
    for source_id, latent in zip(latents["source_id"], latents["latent"], strict=True):
        by_caption.setdefault(source_id, set()).add(latent)
    assert all(len(drawn) == 2 for drawn in by_caption.values())


def test_rejected_captions_are_accounted_and_their_neighbours_drawn(tiny_teacher, tmp_path):
    bad = Rejected("empty_caption").record(id="c1", source="list.txt", ordinal=1)
    table = generate(tmp_path / "pairs", tiny_teacher, captions=[CAPTIONS[0], bad, *CAPTIONS[2:4]])
    account = table.manifests()[table.units[0].unit]
    assert (account.rows_read, account.rows_written, account.rejected()) == (4, 3, {"empty_caption": 1})
    assert table.read(["id"]).column("id").to_pylist() == ["c0#0", "c2#0", "c3#0"]


def test_a_list_of_rejected_captions_alone_makes_an_empty_unit(tiny_teacher, tmp_path):
    bad = [Rejected("empty_caption").record(id=f"c{n}", source="l", ordinal=n) for n in range(3)]
    table = generate(tmp_path / "pairs", tiny_teacher, captions=bad)
    assert (table.num_rows, len(table.units)) == (0, 1)


def test_not_finite_rows_are_set_aside(tiny_teacher, tmp_path, monkeypatch):
    def poisoned(self, token_ids, keys):
        latents = torch.zeros(len(keys), *self.bundle.latent_shape, dtype=torch.float16)
        latents[0, 0, 0, 0] = float("nan")
        return latents, np.zeros((len(keys), 16, 16, 3), np.uint8)

    monkeypatch.setattr("pipelines.stages.generate.GeneratePairs.draw", poisoned)
    table = generate(tmp_path / "pairs", tiny_teacher, captions=CAPTIONS[:4])
    account = table.manifests()[table.units[0].unit]
    assert account.rejected() == {"not_finite": 2}  # the first of each batch of three
    assert table.num_rows == 2


def test_a_unit_that_is_given_up_loses_no_row_from_the_account():
    [item, *_] = pending_units(SETTINGS, captions=CAPTIONS, source="list", accounts=[])
    finished = set_aside(item)
    assert [rejection.reason for rejection in finished.rejections] == ["crashed"] * 4
    assert all(values == [] for values in finished.columns.values())


def test_another_teacher_is_refused_by_name(pairs, tmp_path):
    other = tmp_path / "other"
    save(tiny_bundle(seed=1), other)
    with pytest.raises(TableError, match=r"made with other settings: model\.weights\.text_encoder is"):
        generate(Path(pairs.url), str(other))


def test_another_guidance_is_refused_by_name(pairs, tiny_teacher):
    with pytest.raises(TableError, match=r"generation\.guidance is 2\.0 there, 3\.0 here; give a new table"):
        generate(Path(pairs.url), tiny_teacher, settings=SETTINGS.with_values(["generation.guidance=3.0"]))


def test_other_captions_under_the_same_name_are_refused(pairs, tiny_teacher):
    changed = [Caption(id="c0", ordinal=0, text="something else"), *CAPTIONS[1:]]
    with pytest.raises(TableError, match="drawn from other captions"):
        generate(Path(pairs.url), tiny_teacher, captions=changed)


def test_captions_come_from_a_table_in_order(pairs):
    captions = captions_of(pairs, limit=5)
    assert [caption.id for caption in captions] == [f"c{n}#0" for n in range(5)]
    assert [caption.ordinal for caption in captions] == list(range(5))


def verify(url: str, teacher: str, *, units: int = 99):
    table = open_table(url)
    return verify_table(table, recompute=recomputer(table, teacher=teacher), units=units, seed=0)


def test_a_sound_table_is_made_again_bit_for_bit(pairs, tiny_teacher):
    found = verify(pairs.url, tiny_teacher)
    assert (found.units, found.rows, found.recomputed, found.exact, found.faults) == (3, 10, 3, 3, ())


@pytest.fixture
def copy(pairs, tmp_path):
    """A copy of the table that a test may forge."""
    url = tmp_path / "pairs"
    for ending in ("", ".rejects", ".units"):
        shutil.copytree(f"{pairs.url}{ending}", f"{url}{ending}")
    return url


def forge(path: Path, *, column: str) -> None:
    """Exchange two rows' values: a well-formed file with a true account."""
    account = read_manifest(path.read_bytes())
    rows = pq.read_table(path)
    values = rows.column(column).to_pylist()
    values[0], values[1] = values[1], values[0]
    place = rows.schema.get_field_index(column)
    path.write_bytes(to_parquet(rows.set_column(place, rows.schema.field(place), [values]), account))


def test_a_changed_file_is_found_by_its_hash(copy, tiny_teacher):
    forge(next(iter(sorted(copy.glob("*.parquet")))), column="latent")
    assert any(
        "not the file that was committed" in fault
        for fault in verify(str(copy), tiny_teacher, units=0).faults
    )


def test_a_forged_row_is_found_when_its_unit_is_sampled(copy, tiny_teacher, monkeypatch):
    path = next(iter(sorted(copy.glob("*.parquet"))))
    forge(path, column="latent")
    # The forger has also put the new hash into the units table: only making the unit again tells.
    written = read_written_unit(str(path))
    records = {record["unit"]: record for record in open_table(str(copy)).unit_records()}
    records[written.manifest.unit]["sha256"] = written.sha256
    monkeypatch.setattr(Snapshot, "unit_records", lambda _: list(records.values()))
    assert verify(str(copy), tiny_teacher, units=0).faults == ()
    faults = verify(str(copy), tiny_teacher).faults
    assert [fault.split(":")[0] for fault in faults] == ["row c0#0", "row c1#0"]


def test_a_missing_file_is_found(copy, tiny_teacher):
    next(iter(sorted(copy.glob("*.parquet")))).unlink()
    assert any("cannot be read" in fault for fault in verify(str(copy), tiny_teacher).faults)


def test_verification_with_another_teacher_is_refused(pairs, tmp_path):
    other = tmp_path / "other"
    save(tiny_bundle(seed=2), other)
    with pytest.raises(TableError, match="another teacher"):
        verify(pairs.url, str(other))
