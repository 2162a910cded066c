"""SAMPLES and REFERENCES: pictures from the same noise for every model, judged; features of real pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from in_process import in_process
from PIL import Image
from safetensors.torch import save_file

from pipelines.datasets import references
from pipelines.datasets import samples as samples_of_models
from pipelines.datasets.pairs import TableError
from pipelines.datasets.references import compute_references, moments_of
from pipelines.datasets.samples import generate_samples, read_scores, source_name
from pipelines.datasets.settings import ReferencesSettings, SamplesSettings
from pipelines.rejections import Rejected
from pipelines.sources import SourceError
from pipelines.sources.captions import Caption
from pipelines.stages.sample import SampleAndScore
from pipelines.stages.settings import (
    FeatureSettings,
    MetricSettings,
    Sampler,
    SamplingSettings,
    ScorerSettings,
)
from pipelines.tables.schemas import from_png
from pipelines.tables.verification import verify_table
from snapfusion.metrics.clip import load_scorer
from snapfusion.metrics.inception import Inception
from snapfusion.metrics.moments import Moments
from snapfusion.mini.oracle import load_oracle
from snapfusion.mini.scenes import HELD_OUT, caption_of, image_batch, parse_caption, scene_of
from snapfusion.mini.weights import WEIGHTS
from snapfusion.models.blocks import skipping_blocks
from snapfusion.models.bundle import to_uint8
from snapfusion.models.decoder import HalfDecoder, load_decoder
from snapfusion.models.load import load
from snapfusion.noise import gaussian_batch, noise_key
from snapfusion.sampling import sample, time_grid

CAPTIONS = [Caption(id=f"c{n}", ordinal=n, text=caption_of(scene_of(HELD_OUT + n * 7))) for n in range(6)]
SETTINGS = SamplesSettings(drawing=SamplingSettings(batch_size=3, images=True), rows_per_unit=4)
SAMPLER = Sampler(solver="dpm++", steps=3)


def draw(url, *, settings=SETTINGS, sampler=SAMPLER, guidance=(1.0, 2.5), captions=CAPTIONS):
    return generate_samples(
        settings,
        model="mini",
        sampler=sampler,
        guidance=guidance,
        captions=captions,
        source="list",
        url=str(url),
        run=in_process,
    )


def describe(url, settings, judging=None):
    return compute_references(settings, judging=judging or MetricSettings(), url=str(url), run=in_process)


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("run") / "samples")


def test_a_picture_is_the_solvers_and_is_judged_against_its_own_caption(samples):
    bundle = load("mini")
    texts = [caption.text for caption in CAPTIONS[:3]]
    keys = [noise_key("evaluation", 0, caption.id) for caption in CAPTIONS[:3]]
    with torch.inference_mode():
        latents = sample(
            bundle.denoiser(bundle.encode_text(bundle.tokenize(texts)), w=2.5),
            gaussian_batch(keys, bundle.latent_shape),
            solver="dpm++",
            grid=time_grid(3),
            schedule=bundle.schedule,
        )
        images = to_uint8(bundle.decode(latents))
        oracle = load_oracle()
        features = oracle.features(images)
    rows = samples.read_unit(samples.units[2]).slice(0, 3)
    assert rows.column("id").to_pylist() == ["c0@2.5", "c1@2.5", "c2@2.5"]
    assert rows.column("noise_key").to_pylist() == keys
    stored = torch.from_numpy(np.stack([from_png(image) for image in rows.column("image").to_pylist()]))
    assert torch.equal(stored.permute(0, 3, 1, 2), images)
    found = read_scores(samples, source="list", w=2.5)
    np.testing.assert_array_equal(found.features[:3], features.numpy())
    np.testing.assert_array_equal(
        found.clip[:3], load_scorer(WEIGHTS / "scorer").score(images, texts).numpy()
    )
    right = oracle.score(images, [parse_caption(text) for text in texts]).numpy()
    np.testing.assert_array_equal(found.right[:3], right)


def test_rows_come_in_the_order_of_the_captions_at_every_guidance(samples):
    for w in (1.0, 2.5):
        found = read_scores(samples, source="list", w=w)
        assert found.ids == [caption.id for caption in CAPTIONS]
        assert found.features.shape == (6, 128)
        assert found.right.shape == (6, 5)


def test_every_model_solver_and_guidance_starts_from_the_same_noise(samples, tmp_path):
    other = draw(tmp_path / "other", sampler=Sampler(solver="ddim", steps=2), guidance=(4.0,))
    keys = [table.read(["source_id", "noise_key"]).to_pylist() for table in (samples, other)]
    assert {(row["source_id"], row["noise_key"]) for row in keys[0]} == {
        (row["source_id"], row["noise_key"]) for row in keys[1]
    }


def test_another_guidance_and_more_captions_add_units_and_change_none(tmp_path):
    few = draw(tmp_path / "samples", guidance=(2.0,), captions=CAPTIONS[:4])
    before = {file.unit: Path(file.path).read_bytes() for file in few.units}
    more = draw(tmp_path / "samples", guidance=(2.0, 3.0))
    assert len(more.units) == 4
    assert more.num_rows == 12
    assert {name: Path(f"{more.url}/{name}.parquet").read_bytes() for name in before} == before
    assert read_scores(more, source="list", w=2.0).ids == [caption.id for caption in CAPTIONS]


def test_another_sampler_judge_or_list_is_refused(tmp_path, samples):
    with pytest.raises(TableError, match=r"sampler\.steps is 3 there, 2 here"):
        draw(samples.url, sampler=Sampler(solver="dpm++", steps=2))
    with pytest.raises(TableError, match="drawn from other captions"):
        draw(samples.url, captions=[*CAPTIONS[1:], CAPTIONS[0]])
    with pytest.raises(TableError, match="no rows of list at guidance 5"):
        read_scores(samples, source="list", w=5.0)


def test_rejected_captions_and_pictures_that_are_not_finite_are_accounted(tmp_path, monkeypatch):
    def poisoned(self, texts, keys, *, w):
        latents = torch.zeros(len(keys), *self.bundle.latent_shape)
        latents[0, 0, 0, 0] = float("nan")
        return latents

    monkeypatch.setattr(SampleAndScore, "draw", poisoned)
    bad = Rejected("empty_caption").record(id="c1", source="list.txt", ordinal=1)
    table = draw(tmp_path / "samples", guidance=(1.0,), captions=[CAPTIONS[0], bad, *CAPTIONS[2:4]])
    account = table.manifests()[table.units[0].unit]
    assert account.rejected() == {"empty_caption": 1, "not_finite": 1}
    assert read_scores(table, source="list", w=1.0).ids == ["c2", "c3"]


def test_names_of_units_sort_as_the_guidance_does():
    scales = [1.0, 1.5, 2.0, 7.5, 10.0, 14.0]
    assert sorted(source_name("list", w) for w in scales) == [source_name("list", w) for w in scales]
    with pytest.raises(ValueError, match=r"guidance is 0\.5"):
        source_name("list", 0.5)


def test_references_are_described_once_and_their_moments_are_those_of_all(tmp_path):
    table = describe(tmp_path / "references", ReferencesSettings(count=10, rows_per_unit=4))
    with torch.inference_mode():
        expected = Moments.of(load_oracle().features(image_batch(range(HELD_OUT, HELD_OUT + 10))))
    moments = moments_of(table)
    assert moments.count == 10
    np.testing.assert_allclose(moments.mean.numpy(), expected.mean.numpy(), rtol=1e-6, atol=1e-6)
    # The network's own float32 rounding differs with the batch.
    np.testing.assert_allclose(moments.scatter.numpy(), expected.scatter.numpy(), rtol=1e-4, atol=1e-3)
    assert (
        describe(tmp_path / "references", ReferencesSettings(count=10, rows_per_unit=4)).version
        == table.version
    )
    with pytest.raises(TableError, match="other pictures"):
        describe(tmp_path / "references", ReferencesSettings(count=6, rows_per_unit=4))


def test_references_from_a_folder_are_cropped_and_bad_ones_set_aside(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    scenes = image_batch(range(HELD_OUT, HELD_OUT + 3)).permute(0, 2, 3, 1).numpy()
    for number, scene in enumerate(scenes):
        wide = np.pad(scene, ((0, 0), (8, 8), (0, 0)))
        Image.fromarray(wide).save(folder / f"{number}.png")
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("not a picture's name")
    settings = ReferencesSettings(name="folder", url=str(folder), count=4, size=32)
    table = describe(tmp_path / "references", settings)
    with torch.inference_mode():
        expected = Moments.of(load_oracle().features(torch.from_numpy(scenes.copy()).permute(0, 3, 1, 2)))
    assert table.manifests()[table.units[0].unit].rejected() == {"not_an_image": 1}
    np.testing.assert_allclose(moments_of(table).mean.numpy(), expected.mean.numpy(), rtol=1e-5, atol=1e-5)
    with pytest.raises(SourceError, match="holds 4 pictures, 5 are asked for"):
        describe(tmp_path / "more", settings.with_values(["count=5"]))


def test_judges_without_their_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="weights are a file for inception"):
        FeatureSettings(network="inception")
    with pytest.raises(ValueError, match="weights are a file for a model of open_clip"):
        ScorerSettings(network="ViT-g-14")
    with pytest.raises(ValueError, match="there is no file"):
        MetricSettings(features=FeatureSettings(network="inception", weights="nowhere")).describe_features()


def test_sound_tables_are_made_again_bit_for_bit(samples, tmp_path):
    remake = samples_of_models.recomputer(samples, settings=SETTINGS, model="mini")
    found = verify_table(samples, recompute=remake, units=2, seed=0)
    assert (found.faults, found.recomputed, found.exact) == ((), 2, 2)
    settings = ReferencesSettings(count=6, rows_per_unit=4)
    table = describe(tmp_path / "references", settings)
    remake = references.recomputer(table, settings=settings, judging=MetricSettings())
    found = verify_table(table, recompute=remake, units=2, seed=0)
    assert (found.faults, found.recomputed, found.exact) == ((), 2, 2)
    with pytest.raises(TableError, match="made otherwise"):
        samples_of_models.recomputer(samples, settings=SETTINGS.with_values(["drawing.seed=1"]), model="mini")


def test_inceptions_features_are_named_by_weights_and_kernel(tmp_path):
    torch.manual_seed(0)
    save_file(Inception().network.state_dict(), tmp_path / "inception.safetensors")
    features = FeatureSettings(network="inception", weights=str(tmp_path / "inception.safetensors"))
    judging = MetricSettings(features=features)
    table = describe(tmp_path / "references", ReferencesSettings(count=2), judging)
    assert table.identity["features"]["resize"] == "bicubic"
    moments = moments_of(table)
    assert moments.dimension == 2048
    assert "at least 2049 are needed" in moments.rank_warning()
    bilinear = MetricSettings(features=features.model_copy(update={"resize": "bilinear"}))
    with pytest.raises(TableError, match=r'features\.resize is "bicubic" there'):
        describe(tmp_path / "references", ReferencesSettings(count=2), bilinear)


CUTS = {"attention": ("mid_block.attentions.0",), "two": ("down_blocks.0.resnets.1", "up_blocks.2.resnets.1")}


def draw_cut(url, cuts):
    return generate_samples(
        SETTINGS,
        model="mini",
        sampler=SAMPLER,
        guidance=(2.0,),
        captions=CAPTIONS,
        source="list",
        url=str(url),
        cuts=cuts,
        run=in_process,
    )


def test_a_cut_unet_draws_from_the_same_noise_what_it_draws_without_its_blocks(tmp_path):
    table = draw_cut(tmp_path / "samples", CUTS)
    whole = read_scores(draw(tmp_path / "whole", guidance=(2.0,)), source="list", w=2.0)
    np.testing.assert_array_equal(read_scores(table, source="list", w=2.0).features, whole.features)
    artist = SampleAndScore(
        model="mini",
        sampler=SAMPLER,
        drawing=SETTINGS.drawing,
        judging=SETTINGS.judging,
        device=SETTINGS.device,
    )
    keys = [noise_key("evaluation", 0, caption.id) for caption in CAPTIONS[:3]]
    for cut, blocks in CUTS.items():
        with skipping_blocks(artist.bundle.unet, blocks):
            expected = artist.draw_and_judge([caption.text for caption in CAPTIONS[:3]], keys, w=2.0)
        found = read_scores(table, source="list", w=2.0, cut=cut)
        np.testing.assert_array_equal(found.features[:3], expected["features"])
        assert not np.array_equal(found.features, whole.features)
    ids = table.read(["id"]).column("id").to_pylist()
    assert len(set(ids)) == len(ids) == 18
    assert "c0@2-two" in ids


def test_cuts_are_part_of_the_table_and_its_units_can_be_made_again(tmp_path):
    table = draw_cut(tmp_path / "samples", CUTS)
    remake = samples_of_models.recomputer(table, settings=SETTINGS, model="mini")
    found = verify_table(table, recompute=remake, units=6, seed=0)
    assert (found.faults, found.recomputed, found.exact) == ((), 6, 6)
    with pytest.raises(TableError, match=r"cuts"):
        draw_cut(table.url, {"attention": ("down_blocks.1.attentions.0",)})
    with pytest.raises(ValueError, match=r"no block 'mid_block\.attentions\.7'"):
        draw_cut(tmp_path / "other", {"none": ("mid_block.attentions.7",)})


def test_a_half_width_decoder_can_draw_in_place_of_the_models_own(tmp_path):
    HalfDecoder.from_vae(load("mini").vae).save(str(tmp_path / "decoder"))

    def draw_by(decoder):
        return generate_samples(
            SETTINGS,
            model="mini",
            sampler=SAMPLER,
            guidance=(2.0,),
            captions=CAPTIONS,
            source="list",
            url=str(tmp_path / "samples"),
            decoder=decoder,
            run=in_process,
        )

    table = draw_by(str(tmp_path / "decoder"))
    half = load_decoder(str(tmp_path / "decoder"))
    artist = SampleAndScore(
        model="mini",
        sampler=SAMPLER,
        drawing=SETTINGS.drawing,
        judging=SETTINGS.judging,
        device=SETTINGS.device,
    )
    texts = [caption.text for caption in CAPTIONS[:3]]
    with torch.inference_mode():
        latents = artist.draw(texts, [noise_key("evaluation", 0, row.id) for row in CAPTIONS[:3]], w=2.0)
        images = to_uint8(half.decode(latents)).permute(0, 2, 3, 1).numpy()
    rows = table.read_unit(table.units[0]).slice(0, 3)
    np.testing.assert_array_equal(
        np.stack([from_png(one) for one in rows.column("image").to_pylist()]), images
    )
    with pytest.raises(TableError, match="decoder is"):
        draw_by(None)
    with pytest.raises(TableError, match="decoder is"):
        samples_of_models.recomputer(table, settings=SETTINGS, model="mini")
    remake = samples_of_models.recomputer(
        table, settings=SETTINGS, model="mini", decoder=str(tmp_path / "decoder")
    )
    found = verify_table(table, recompute=remake, units=2, seed=0)
    assert (found.faults, found.exact) == ((), 2)
