import json

import pytest
import torch
from diffusers import StableDiffusionPipeline

from snapfusion.metrics.clip import load_scorer
from snapfusion.mini.oracle import load_oracle
from snapfusion.mini.scenes import HELD_OUT, NUM_CAPTIONS, image_batch, scene_of
from snapfusion.mini.training.contrast import NEGATIVES, contrastive_loss, draw_captions
from snapfusion.mini.training.recipe import Trainer, train
from snapfusion.mini.training.settings import MiniTraining, StageSettings
from snapfusion.mini.training.stage import learning_rate, step_generator, training_indexes
from snapfusion.mini.weights import altered_files, read_manifest

STAGES = ("autoencoder", "decoder", "text", "scorer", "oracle", "denoiser")
TINY = MiniTraining(
    checkpoint_every=2,
    scenes=30,
    **{name: StageSettings(samples=18, batch=6, lr=1e-3) for name in STAGES},
)


class Killed(Exception):
    """Stands for a process that ends in the middle of a stage."""


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mini")
    train(TINY, folder=folder)
    return folder


def test_all_stages_end_in_a_folder_that_diffusers_opens(trained):
    weights = trained / "weights"
    pipeline = StableDiffusionPipeline.from_pretrained(weights / "sd", safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline("a small red ring", num_inference_steps=2, guidance_scale=2.0, output_type="np").images
    assert images.shape == (1, 32, 32, 3)
    assert pipeline.scheduler.config.prediction_type == "epsilon"
    assert load_scorer(weights / "scorer").score(image_batch([1]), ["a ring"]).shape == (1,)
    assert load_oracle(weights / "oracle").read(image_batch([1]))


def test_manifest_tells_of_every_file(trained):
    weights = trained / "weights"
    manifest = read_manifest(weights)
    assert manifest["recipe"] == TINY.to_values()
    assert set(manifest["curves"]) == set(STAGES)
    assert altered_files(weights) == []
    config = weights / "scorer" / "open_clip_config.json"
    text = config.read_text()
    config.write_text(text + " ")
    assert altered_files(weights) == ["scorer/open_clip_config.json"]
    config.write_text(text)


def test_second_run_trains_nothing(trained):
    steps = []
    before = read_manifest(trained / "weights")
    train(TINY, folder=trained, on_progress=lambda stage, step, *_: steps.append((stage, step)))
    assert steps == []
    assert read_manifest(trained / "weights") == before


@pytest.mark.parametrize("stage", ["oracle", "denoiser"])
def test_killed_stage_ends_with_the_same_weights(trained, tmp_path, stage):
    """Killed after step 3 of 5, whose last checkpoint is of step 2, and started again."""
    settings = TINY.model_copy(update={stage: StageSettings(samples=30, batch=6, lr=1e-3)})

    def result(folder, on_progress=None):
        trainer = Trainer(settings=settings, folder=folder, on_progress=on_progress)
        if stage == "oracle":
            return trainer.oracle().state_dict()
        vae, text_encoder = trainer.autoencoder(), trainer.text_encoder()
        return trainer.unet(vae=vae, text_encoder=text_encoder).state_dict()

    def kill(name, step, *_):
        if name == stage and step == 3:
            raise Killed

    killed, whole = tmp_path / "killed", tmp_path / "whole"
    for folder in (killed, whole):
        folder.mkdir()
        for name in ("autoencoder", "decoder", "text"):
            (folder / f"{name}.safetensors").symlink_to(trained / "checkpoints" / f"{name}.safetensors")
    with pytest.raises(Killed):
        result(killed, kill)
    resumed, expected = result(killed), result(whole)
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


def test_checkpoint_of_other_settings_is_refused(trained):
    other = TINY.with_values(["seed=1"])
    with pytest.raises(ValueError, match="trained with other settings"):
        train(other, folder=trained)


def test_training_never_sees_held_out_scenes_and_captions_differ_within_a_batch():
    indexes = training_indexes(NUM_CAPTIONS, step_generator(seed=0, stage="oracle", step=1))
    assert max(indexes) < HELD_OUT
    assert len({scene_of(index) for index in indexes}) == NUM_CAPTIONS


def test_altered_captions_differ_from_the_true_one_in_one_place():
    captions = draw_captions([4, 5], step_generator(seed=0, stage="text", step=0))
    assert len(captions) == 2 * (1 + NEGATIVES)
    for number, altered in enumerate(captions[2:]):
        assert altered != captions[number // NEGATIVES]


def test_contrastive_loss_falls_when_each_picture_is_its_caption():
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
    assert json.loads(settings.to_json())["batch"] == 10
