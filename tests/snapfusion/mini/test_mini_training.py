import pytest
import torch
from diffusers import StableDiffusionPipeline

from snapfusion.metrics.clip import load_scorer
from snapfusion.mini import models
from snapfusion.mini.oracle import load_oracle
from snapfusion.mini.scenes import HELD_OUT, caption_of, image_batch, parse_caption, scene_of
from snapfusion.mini.training.contrast import NEGATIVES, contrastive_loss, draw_captions
from snapfusion.mini.training.denoiser import skipped_blocks
from snapfusion.mini.training.noisy_captions import NoisyCaptions, caption_without, noisy_caption
from snapfusion.mini.training.recipe import Trainer, train
from snapfusion.mini.training.settings import (
    CaptionNoiseSettings,
    DenoiserSettings,
    MiniTraining,
    StageSettings,
)
from snapfusion.mini.training.stage import learning_rate, step_generator, training_indexes
from snapfusion.mini.vocabulary import ATTRIBUTES, NUM_CAPTIONS
from snapfusion.mini.weights import read_manifest
from snapfusion.models.checksums import file_records
from snapfusion.models.load import load

BASE = ("autoencoder", "decoder", "text", "scorer", "oracle", "denoiser", "velocity")
STAGES = (*BASE, "noisy_denoiser", "noisy_velocity")


def shortened(stage, samples=18):
    """The stage's default settings with three steps of six images."""
    return MiniTraining.model_fields[stage].default.model_copy(update={"samples": samples, "batch": 6})


TINY = MiniTraining(checkpoint_every=2, scenes=30, **{stage: shortened(stage) for stage in STAGES})


class Killed(Exception):
    """Simulates a process that ends during a stage."""


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def trained(one_thread, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mini")
    train(TINY, folder=folder)
    return folder


@pytest.mark.slow
def test_trained_weights_open_in_diffusers(trained):
    weights = trained / "weights"
    for name, kind in (("sd", "epsilon"), ("sd-v", "v_prediction")):
        pipeline = StableDiffusionPipeline.from_pretrained(weights / name, safety_checker=None)
        pipeline.set_progress_bar_config(disable=True)
        options = {"num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "np"}
        assert pipeline("a small red ring", **options).images.shape == (1, 32, 32, 3)
        assert pipeline.scheduler.config.prediction_type == kind
    assert load_scorer(weights / "scorer").score(image_batch([1]), ["a ring"]).shape == (1,)
    assert load_oracle(weights / "oracle").read(image_batch([1]))


@pytest.mark.slow
def test_manifest_records_files_recipe_and_curves(trained):
    weights = trained / "weights"
    manifest = read_manifest(weights)
    assert manifest["recipe"] == TINY.to_values()
    assert set(manifest["curves"]) == set(STAGES)
    files = file_records(weights)
    del files["manifest.json"]
    assert manifest["files"] == files


@pytest.mark.slow
def test_a_complete_training_is_not_repeated(trained):
    steps = []
    before = read_manifest(trained / "weights")
    train(TINY, folder=trained, on_progress=lambda stage, step, *_: steps.append((stage, step)))
    assert steps == []
    assert read_manifest(trained / "weights") == before


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["oracle", "velocity", "noisy_velocity"])
def test_a_killed_stage_resumes_to_identical_weights(trained, tmp_path, stage):
    """Killed after step 3 of 5, with a checkpoint of step 2, and resumed."""
    settings = TINY.model_copy(update={stage: shortened(stage, samples=30)})

    def result(folder, on_progress=None):
        trainer = Trainer(settings=settings, folder=folder, on_progress=on_progress)
        if stage == "oracle":
            return trainer.oracle().state_dict()
        if stage == "noisy_velocity":
            model = load(str(trained / "base" / "sd-v"))
            encoded = trainer.encoded(vae=model.vae, text_encoder=model.text_encoder)
            return trainer.with_noisy_captions(model, encoded).state_dict()
        vae, text_encoder = trainer.autoencoder(), trainer.text_encoder()
        trainer.scale_latents(vae)
        encoded = trainer.encoded(vae=vae, text_encoder=text_encoder)
        unet = trainer.denoiser(encoded)
        return (trainer.velocity(unet, encoded) if stage == "velocity" else unet).state_dict()

    def kill(name, step, *_):
        if name == stage and step == 3:
            raise Killed

    killed, whole = tmp_path / "killed", tmp_path / "whole"
    for folder in (killed, whole):
        folder.mkdir()
        for name in ("autoencoder", "decoder", "text", *(["denoiser"] if stage == "velocity" else [])):
            (folder / f"{name}.safetensors").symlink_to(trained / "checkpoints" / f"{name}.safetensors")
    with pytest.raises(Killed):
        result(killed, kill)
    resumed, expected = result(killed), result(whole)
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_checkpoints_of_other_settings_are_refused(trained):
    other = TINY.with_values(["seed=1"])
    with pytest.raises(ValueError, match="trained with other settings"):
        train(other, folder=trained)


def test_training_batches_have_different_training_captions():
    indexes = training_indexes(NUM_CAPTIONS, step_generator(seed=0, stage="oracle", step=1))
    assert max(indexes) < HELD_OUT
    assert len({scene_of(index) for index in indexes}) == NUM_CAPTIONS


@pytest.mark.slow
def test_only_the_unets_of_a_base_are_trained(trained, tmp_path):
    """From the same base, as the whole training goes on from it."""
    base = trained / "base"
    train(TINY, folder=tmp_path, base=base)
    before, after = file_records(base), file_records(tmp_path / "weights")
    changed = {name for name in after if before[name] != after[name]} - {"manifest.json"}
    weights = {name for name in changed if name.endswith(".safetensors")}
    assert {name.rpartition("/")[0] for name in weights} == {"sd/unet", "sd-v/unet"}
    assert after == file_records(trained / "weights")
    assert set(read_manifest(base)["curves"]) == set(BASE)
    with pytest.raises(ValueError, match="trained on noisy captions; weights from right ones"):
        train(TINY, folder=tmp_path, base=tmp_path / "weights")


def test_noisy_captions_are_wrong_or_incomplete_at_their_shares():
    captions = NoisyCaptions.of(CaptionNoiseSettings(wrong_word=0.2, missing_word=0.1))
    numbers = torch.arange(20_000) % NUM_CAPTIONS
    indexes = captions.draw(numbers, generator=torch.Generator().manual_seed(0))
    assert float((indexes == numbers).float().mean()) == pytest.approx(0.7, abs=0.02)
    assert float((indexes >= NUM_CAPTIONS).float().mean()) == pytest.approx(0.1, abs=0.02)
    for number, index in zip(numbers[:500].tolist(), indexes[:500].tolist(), strict=True):
        right, text = caption_of(scene_of(number)), captions.texts[index]
        if index < NUM_CAPTIONS:
            labels = zip(scene_of(number).labels(), scene_of(index).labels(), strict=True)
            differing = [one != two for one, two in labels]
            assert sum(differing) == (index != number)
        else:
            assert len(text) < len(right)
            assert set(text.split()) < set(right.split())
    with pytest.raises(ValueError, match="at most 1 together"):
        CaptionNoiseSettings(wrong_word=0.6, missing_word=0.6)


def test_one_scene_gets_the_captions_of_a_batch():
    settings = CaptionNoiseSettings(wrong_word=0.3, missing_word=0.3)
    numbers = torch.arange(500)
    kinds, choices = torch.rand((2, 500), generator=torch.Generator().manual_seed(1)).tolist()
    captions = NoisyCaptions.of(settings)
    indexes = captions.draw(numbers, generator=torch.Generator().manual_seed(1)).tolist()
    for number, kind, choice, index in zip(numbers.tolist(), kinds, choices, indexes, strict=True):
        caption = noisy_caption(scene_of(number), settings, kind=kind, choice=choice)
        assert caption == captions.texts[index]


def test_an_attribute_is_left_out():
    scene = parse_caption("a large red circle at the top on a white background")
    assert [caption_without(scene, name) for name in ATTRIBUTES] == [
        "a red circle at the top on a white background",
        "a large circle at the top on a white background",
        "a large red at the top on a white background",
        "a large red circle on a white background",
        "a large red circle at the top",
    ]


def test_negative_captions_differ_from_the_true_one():
    captions = draw_captions([4, 5], step_generator(seed=0, stage="text", step=0))
    assert len(captions) == 2 * (1 + NEGATIVES)
    for number, altered in enumerate(captions[2:]):
        assert altered != captions[number // NEGATIVES]


def test_contrastive_loss_is_low_for_matching_pairs():
    vectors = torch.eye(4)
    altered = (-vectors).repeat_interleave(NEGATIVES, dim=0)
    factor = torch.tensor(3.0)
    right = contrastive_loss(images=vectors, texts=torch.cat([vectors, altered]), log_temperature=factor)
    wrong = contrastive_loss(images=vectors, texts=torch.cat([-vectors, -altered]), log_temperature=factor)
    assert right < 1e-3 < 1.0 < wrong


def test_learning_rate_rises_then_falls_to_zero():
    settings = StageSettings(samples=1000, batch=10, lr=1.0)
    rates = [learning_rate(step, settings) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == rates[4]
    assert rates[-1] < 1e-3


def test_shallow_attention_is_skipped_first_then_randomly():
    unet = models.unet()
    settings = DenoiserSettings(samples=1000, batch=1, lr=1.0, deep_first=0.3, shallow_skip=0.4)

    def depth(step):
        generator = step_generator(seed=0, stage="denoiser", step=step)
        names = skipped_blocks(unet, step=step, generator=generator, settings=settings)
        assert all("attentions" in name for name in names)
        assert not any(name.startswith("mid_block") for name in names)
        return len({name.split(".")[1] for name in names if name.startswith("down")})

    depths = [depth(step) for step in range(1000)]
    assert set(depths[:300]) == {2}
    later = [depths[300:].count(number) / 700 for number in range(3)]
    assert later == pytest.approx([0.6, 0.2, 0.2], abs=0.06)


@pytest.mark.slow
def test_velocity_starts_from_the_denoisers_weights(trained):
    """After three steps at a small learning rate it is nearer to them than to fresh weights."""
    unets = [load(str(trained / "base" / name)).unet.state_dict() for name in ("sd", "sd-v")]
    fresh = models.unet().state_dict()
    name = "mid_block.resnets.0.conv1.weight"
    moved, elsewhere = ((unets[1][name] - other[name]).norm() for other in (unets[0], fresh))
    assert 0 < moved < 0.2 * elsewhere
