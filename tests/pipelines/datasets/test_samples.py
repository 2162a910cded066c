"""SAMPLES and REFERENCES: scored images from the same noise for every model; features of real images."""

import numpy as np
import pytest
import torch
from in_process import in_process
from latent_inputs import data_files, verify
from PIL import Image
from safetensors.torch import save_file

from pipelines.datasets import references
from pipelines.datasets.references import compute_references, moments_of
from pipelines.datasets.samples import generate_samples, read_features, read_scores, recomputer, source_name
from pipelines.datasets.settings import ReferencesSettings, SamplesSettings
from pipelines.rejections import Rejected
from pipelines.sources import SourceError
from pipelines.sources.captions import Caption
from pipelines.stages.metric_networks import describe_features
from pipelines.stages.sample import SampleAndScore
from pipelines.stages.settings import (
    FeatureSettings,
    MetricSettings,
    Sampler,
    SamplingSettings,
    ScorerSettings,
)
from pipelines.tables.schemas import from_png
from pipelines.tables.table import TableError
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
IDS = [caption.id for caption in CAPTIONS]
TEXTS = [caption.text for caption in CAPTIONS]
KEYS = [noise_key("evaluation", 0, id_) for id_ in IDS]
SETTINGS = SamplesSettings(drawing=SamplingSettings(batch_size=3, images=True), rows_per_unit=4)
SAMPLER = Sampler(solver="dpm++", steps=3)
CUTS = {"attention": ("mid_block.attentions.0",), "two": ("down_blocks.0.resnets.1", "up_blocks.2.resnets.1")}


def generate(url, **inputs):
    defaults = {"sampler": SAMPLER, "guidance": (2.0,), "captions": CAPTIONS}
    return generate_samples(
        SETTINGS, model="mini", source="list", url=str(url), run=in_process, **defaults | inputs
    )


def verified(table, units: int, **inputs):
    found = verify(table, recomputer(table, settings=SETTINGS, model="mini", **inputs), units=units)
    return found.faults, found.recomputed, found.exact


def compute(url, settings, metrics=None):
    return compute_references(settings, metrics=metrics or MetricSettings(), url=str(url), run=in_process)


def images_of(rows) -> np.ndarray:
    return np.stack([from_png(image) for image in rows.column("image").to_pylist()])


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    return generate(tmp_path_factory.mktemp("run") / "samples", guidance=(1.0, 2.5))


@pytest.fixture(scope="module")
def stage():
    inputs = {"sampling": SETTINGS.drawing, "metrics": SETTINGS.judging, "device": SETTINGS.device}
    return SampleAndScore(model="mini", sampler=SAMPLER, **inputs)


def test_image_equals_solvers_and_is_scored(samples):
    bundle, texts = load("mini"), TEXTS[:3]
    with torch.inference_mode():
        denoiser = bundle.denoiser(bundle.encode_text(bundle.tokenize(texts)), w=2.5)
        eps = gaussian_batch(KEYS[:3], bundle.latent_shape)
        latents = sample(denoiser, eps, solver="dpm++", grid=time_grid(3), schedule=bundle.schedule)
        images = to_uint8(bundle.decode(latents))
        oracle = load_oracle()
        features = oracle.features(images)
    rows = samples.read_unit(samples.units[2]).slice(0, 3)
    assert rows.column("id").to_pylist() == ["c0@2.5", "c1@2.5", "c2@2.5"]
    assert rows.column("noise_key").to_pylist() == KEYS[:3]
    np.testing.assert_array_equal(images_of(rows), images.permute(0, 2, 3, 1))
    scores = read_scores(samples, source="list", w=2.5)
    np.testing.assert_array_equal(read_features(samples, source="list", w=2.5)[:3], features.numpy())
    clip = load_scorer(WEIGHTS / "scorer").score(images, texts)
    np.testing.assert_array_equal(scores.clip[:3], clip.numpy())
    right = oracle.score(images, [parse_caption(text) for text in texts]).numpy()
    np.testing.assert_array_equal(scores.right[:3], right)


def test_consistency_samples_take_the_noise_of_their_keys():
    sampler = Sampler(solver="consistency", steps=2)
    inputs = {"sampling": SETTINGS.drawing, "metrics": SETTINGS.judging, "device": SETTINGS.device}
    stage = SampleAndScore(model="mini", sampler=sampler, **inputs)
    with torch.inference_mode():
        together = stage.sample(TEXTS[:3], KEYS[:3], w=2.5)
        alone = stage.sample(TEXTS[1:2], KEYS[1:2], w=2.5)
        bundle = stage.bundle
        x = bundle.denoiser(bundle.encode_text(bundle.tokenize(TEXTS[1:2])), w=2.5)
        eps = gaussian_batch(KEYS[1:2], bundle.latent_shape)
        first = x(eps, torch.tensor([999])).x
        fresh = gaussian_batch([noise_key("step", KEYS[1], 499)], bundle.latent_shape)
        t = torch.tensor([499])
        expected = x(bundle.schedule.diffuse(x=first, eps=fresh, t=t), t).x
    torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(alone, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("w", [1.0, 2.5])
def test_scores_are_in_order_of_the_captions(samples, w):
    scores = read_scores(samples, source="list", w=w)
    assert (scores.ids, scores.right.shape) == (IDS, (6, 5))
    features = read_features(samples, source="list", w=w)
    assert (features.shape, features.dtype) == ((6, 128), np.float32)
    some = read_features(samples, source="list", w=w, ids=[IDS[4], IDS[1]])
    np.testing.assert_array_equal(some, features[[4, 1]])


def test_all_solvers_start_from_the_same_noise(samples, tmp_path):
    other = generate(tmp_path / "other", sampler=Sampler(solver="ddim", steps=2), guidance=(4.0,))
    one, two = (table.read(["source_id", "noise_key"]).to_pylist() for table in (samples, other))
    assert {tuple(row.values()) for row in one} == {tuple(row.values()) for row in two}


def test_more_guidance_and_captions_change_no_unit(tmp_path):
    before = data_files(generate(tmp_path / "samples", captions=CAPTIONS[:4]).url)
    more = generate(tmp_path / "samples", guidance=(2.0, 3.0))
    assert (len(more.units), more.num_rows) == (4, 12)
    assert data_files(more.url).items() >= before.items()
    assert read_scores(more, source="list", w=2.0).ids == IDS


def test_other_sampler_or_captions_are_refused(samples):
    with pytest.raises(TableError, match=r"sampler\.steps is 3 there, 2 here"):
        generate(samples.url, sampler=Sampler(solver="dpm++", steps=2))
    with pytest.raises(TableError, match="made from other rows"):
        generate(samples.url, guidance=(2.5,), captions=[*CAPTIONS[1:], CAPTIONS[0]])
    with pytest.raises(TableError, match="no rows of list at guidance 5"):
        read_scores(samples, source="list", w=5.0)


def test_rejected_and_not_finite_rows_are_counted(tmp_path, monkeypatch):
    def poisoned(self, texts, keys, *, w):
        latents = torch.zeros(len(keys), *self.bundle.latent_shape)
        latents[0, 0, 0, 0] = float("nan")
        return latents

    monkeypatch.setattr(SampleAndScore, "sample", poisoned)
    bad = Rejected("empty_caption").record(id="c1", source="list.txt", ordinal=1)
    table = generate(tmp_path / "samples", captions=[CAPTIONS[0], bad, *CAPTIONS[2:4]])
    assert table.manifests()[table.units[0].unit].rejected() == {"empty_caption": 1, "not_finite": 1}
    assert read_scores(table, source="list", w=2.0).ids == ["c2", "c3"]


def test_source_names_sort_by_guidance():
    scales = [1.0, 1.5, 2.0, 7.5, 10.0, 14.0]
    assert sorted(source_name("list", w) for w in scales) == [source_name("list", w) for w in scales]
    with pytest.raises(ValueError, match=r"guidance is 0\.5"):
        source_name("list", 0.5)


def assert_close(found: Moments, expected: Moments, *, tolerance: float) -> None:
    assert found.count == expected.count
    np.testing.assert_allclose(found.mean.numpy(), expected.mean.numpy(), rtol=tolerance, atol=tolerance)
    # The network's own float32 rounding differs with the batch.
    np.testing.assert_allclose(found.scatter.numpy(), expected.scatter.numpy(), rtol=1e-4, atol=1e-3)


def test_references_have_the_moments_of_all_images(tmp_path):
    settings = ReferencesSettings(count=10, rows_per_unit=4)
    table = compute(tmp_path / "references", settings)
    with torch.inference_mode():
        expected = Moments.of(load_oracle().features(image_batch(range(HELD_OUT, HELD_OUT + 10))))
    assert_close(moments_of(table), expected, tolerance=1e-6)
    assert compute(tmp_path / "references", settings).version == table.version
    with pytest.raises(TableError, match="made from other rows"):
        compute(tmp_path / "references", ReferencesSettings(count=6, rows_per_unit=4))


def test_references_are_cropped_and_bad_images_rejected(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    scenes = image_batch(range(HELD_OUT, HELD_OUT + 3)).permute(0, 2, 3, 1).numpy()
    for number, scene in enumerate(scenes):
        Image.fromarray(np.pad(scene, ((0, 0), (8, 8), (0, 0)))).save(folder / f"{number}.png")
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("not an image's name")
    settings = ReferencesSettings(name="folder", url=str(folder), count=4, size=32)
    table = compute(tmp_path / "references", settings)
    with torch.inference_mode():
        expected = Moments.of(load_oracle().features(torch.from_numpy(scenes.copy()).permute(0, 3, 1, 2)))
    assert table.manifests()[table.units[0].unit].rejected() == {"not_an_image": 1}
    assert_close(moments_of(table), expected, tolerance=1e-5)
    with pytest.raises(SourceError, match="holds 4 images; 5"):
        compute(tmp_path / "more", settings.with_values(["count=5"]))


@pytest.mark.parametrize(
    ("settings", "network"), [(FeatureSettings, "inception"), (ScorerSettings, "ViT-g-14")]
)
def test_networks_without_weights_are_refused(settings, network):
    with pytest.raises(ValueError, match="weights must be a file"):
        settings(network=network)


def test_missing_weights_file_is_refused():
    with pytest.raises(ValueError, match="there is no file"):
        describe_features(FeatureSettings(network="inception", weights="nowhere"))


def test_units_are_recomputed_bit_for_bit(samples, tmp_path):
    assert verified(samples, 2) == ((), 2, 2)
    settings = ReferencesSettings(count=6, rows_per_unit=4)
    table = compute(tmp_path / "references", settings)
    found = verify(table, references.recomputer(table, settings=settings, metrics=MetricSettings()), units=2)
    assert (found.faults, found.recomputed, found.exact) == ((), 2, 2)
    with pytest.raises(TableError, match=r"drawing\.seed is 0 there, 1 here"):
        recomputer(samples, settings=SETTINGS.with_values(["drawing.seed=1"]), model="mini")


def test_inception_features_are_identified_by_kernel(tmp_path):
    torch.manual_seed(0)
    save_file(Inception().network.state_dict(), tmp_path / "inception.safetensors")
    features = FeatureSettings(network="inception", weights=str(tmp_path / "inception.safetensors"))
    table = compute(tmp_path / "references", ReferencesSettings(count=2), MetricSettings(features=features))
    assert table.identity["features"]["resize"] == "bicubic"
    moments = moments_of(table)
    assert moments.dimension == 2048
    assert "2049" in moments.rank_warning()
    bilinear = MetricSettings(features=features.model_copy(update={"resize": "bilinear"}))
    with pytest.raises(TableError, match=r'features\.resize is "bicubic" there'):
        compute(tmp_path / "references", ReferencesSettings(count=2), bilinear)


@pytest.fixture(scope="module")
def cut_samples(tmp_path_factory):
    return generate(tmp_path_factory.mktemp("cuts") / "samples", cuts=CUTS)


def test_cut_unet_samples_from_the_same_noise(cut_samples, stage, tmp_path):
    whole = read_features(generate(tmp_path / "whole"), source="list", w=2.0)
    np.testing.assert_array_equal(read_features(cut_samples, source="list", w=2.0), whole)
    for cut, blocks in CUTS.items():
        with skipping_blocks(stage.bundle.unet, blocks):
            expected = stage.sample_and_score(TEXTS[:3], KEYS[:3], w=2.0)
        features = read_features(cut_samples, source="list", w=2.0, cut=cut)
        np.testing.assert_array_equal(features[:3], expected["features"])
        assert not np.array_equal(features, whole)
    ids = cut_samples.read(["id"]).column("id").to_pylist()
    assert len(set(ids)) == len(ids) == 18
    assert "c0@2-two" in ids


def test_cuts_are_part_of_identity_and_recomputed(cut_samples, tmp_path):
    assert verified(cut_samples, 6) == ((), 6, 6)
    with pytest.raises(TableError, match="cuts"):
        generate(cut_samples.url, cuts={"attention": ("down_blocks.1.attentions.0",)})
    with pytest.raises(ValueError, match=r"mid_block\.attentions\.7"):
        generate(tmp_path / "other", cuts={"none": ("mid_block.attentions.7",)})


def test_half_width_decoder_decodes_samples(stage, tmp_path):
    decoder = str(tmp_path / "decoder")
    HalfDecoder.from_vae(load("mini").vae).save(decoder)
    table = generate(tmp_path / "samples", decoder=decoder)
    with torch.inference_mode():
        latents = stage.sample(TEXTS[:3], KEYS[:3], w=2.0)
        images = to_uint8(load_decoder(decoder).decode(latents)).permute(0, 2, 3, 1)
    np.testing.assert_array_equal(images_of(table.read_unit(table.units[0]).slice(0, 3)), images)
    for refused in (lambda: generate(tmp_path / "samples"), lambda: verified(table, 2)):
        with pytest.raises(TableError, match="decoder is"):
            refused()
    assert verified(table, 2, decoder=decoder)[::2] == ((), 2)
