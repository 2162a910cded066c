"""The safety checker of a diffusers folder: marked images are black in `generate`, or it is turned off."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessor

from jobs import check, generate
from snapfusion.models.checksums import CHECKSUMS_FILE
from snapfusion.models.errors import ModelError
from snapfusion.models.load import load
from snapfusion.models.safety_checker import find_safety_checker, read_safety_checker

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
ALL, NONE = -2.0, 2.0
"""Thresholds of the cosine similarity."""
USED = "the model's safety checker is used; --no-safety-checker turns it off"


def network(threshold: float) -> StableDiffusionSafetyChecker:
    torch.manual_seed(0)
    vision = {**SMALL, "image_size": 32, "patch_size": 16}
    checker = StableDiffusionSafetyChecker(
        CLIPConfig(text_config=SMALL, vision_config=vision, projection_dim=8)
    )
    checker.concept_embeds_weights.data.fill_(threshold)
    checker.special_care_embeds_weights.data.fill_(NONE)
    return checker


@pytest.fixture
def model(tiny_teacher, tmp_path, monkeypatch):
    """Makes a tiny model with a safety checker of a threshold; its folder is in the working directory."""
    monkeypatch.chdir(tmp_path)

    def make(threshold: float) -> str:
        shutil.copytree(tiny_teacher, "model", ignore=shutil.ignore_patterns(CHECKSUMS_FILE))
        network(threshold).save_pretrained("model/safety_checker")
        size = {"height": 32, "width": 32}
        processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size)
        processor.save_pretrained("model/feature_extractor")
        return "model"

    return make


def generated(model: str, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[list[np.ndarray], str]:
    """Generate two images; return them and what was printed."""
    options = ["--steps", "1", "--guidance", "1", "-n", "2", "--out", "a.png"]
    assert generate.main(["red", "--model", model, *options, *words]) == 0
    images = [np.asarray(Image.open(path)) for path in sorted(Path().glob("*.png"))]
    return images, capsys.readouterr().out


@pytest.mark.parametrize(("threshold", "flagged"), [(ALL, 2), (NONE, 0)])
def test_marked_images_are_black_and_counted(model, capsys, threshold, flagged):
    images, printed = generated(model(threshold), capsys)
    assert [not image.any() for image in images] == [bool(flagged)] * 2
    assert printed.splitlines()[0] == USED
    line = "2 of 2 are black: the model's safety checker marks them"
    assert (printed.splitlines()[-1] == line) == bool(flagged)


def test_checker_can_be_turned_off(model, capsys):
    images, printed = generated(model(ALL), capsys, "--no-safety-checker")
    assert all(image.any() for image in images)
    assert printed.splitlines()[0] == "the model's safety checker is off"


def test_models_without_one_say_nothing(tiny_teacher, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in ((), ("--no-safety-checker",)):
        _, printed = generated(tiny_teacher, capsys, *words)
        assert "safety" not in printed
    assert find_safety_checker("mini") is None
    assert find_safety_checker("random:sd15") is None


def test_flags_equal_those_of_diffusers(model):
    folder = find_safety_checker(model(0.0))
    images = np.random.default_rng(0).integers(0, 256, (8, 40, 40, 3), dtype=np.uint8)
    checker = read_safety_checker(folder, source="model")
    pixels = checker.processor([Image.fromarray(image) for image in images], return_tensors="pt").pixel_values
    _, expected = network(0.0).eval()(clip_input=pixels, images=list(images))
    assert checker.flags(images) == expected


def test_names_of_published_tensors_are_read(model):
    folder = find_safety_checker(model(0.0))
    path = folder / "model.safetensors"
    tensors = {
        key.replace("vision_model.", "vision_model.vision_model.", 1): value
        for key, value in load_file(path).items()
    }
    assert sum(key.startswith("vision_model.vision_model.") for key in tensors) > 10
    tensors["vision_model.vision_model.embeddings.position_ids"] = torch.arange(5)
    save_file(tensors, path, metadata={"format": "pt"})
    found, expected = read_safety_checker(folder, source="model").network, network(0.0)
    torch.testing.assert_close(found.state_dict(), expected.state_dict(), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("feature_extractor/preprocessor_config.json", "its feature_extractor cannot be read"),
        ("safety_checker/model.safetensors", "safety_checker has no weights"),
    ],
)
def test_incomplete_checker_is_refused(model, capsys, missing, message):
    source = model(ALL)
    Path(source, missing).unlink()
    with pytest.raises(ModelError, match=message):
        read_safety_checker(find_safety_checker(source), source=source)
    assert generate.main(["red", "--model", source]) == 2
    error = capsys.readouterr().err
    assert "--no-safety-checker generates without it" in error
    assert error.count("\n") == 1
    assert load(source).image_size == 16, "training does without it"


def test_check_says_that_there_is_one(model, capsys):
    assert check.main([model(NONE), "--json"]) == 0
    stored = json.loads(capsys.readouterr().out)["stored"]
    assert (stored["safety_checker"], stored["unread_bytes"]) == (True, 0)


def test_bundles_have_their_own(capsys):
    assert generate.main(["red", "--bundle", "mobile", "--no-safety-checker"]) == 2
    assert "--no-safety-checker: a --bundle has its own" in capsys.readouterr().err
