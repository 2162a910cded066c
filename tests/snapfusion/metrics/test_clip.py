"""CLIP scores of the miniature's scorer and of open_clip's named models."""

import json

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from snapfusion.metrics.clip import build_scorer, load_scorer, open_clip_scorer, save_scorer
from snapfusion.mini.models import scorer_config
from snapfusion.mini.tokenizer import mini_tokenizer

IMAGES = torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
CAPTIONS = ["a small red ring", "a large blue cross"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tokenizer = mini_tokenizer()
    config = scorer_config(len(tokenizer))
    path = tmp_path_factory.mktemp("scorer")
    torch.manual_seed(0)
    save_scorer(build_scorer(config, tokenizer=tokenizer).model, path, config=config, tokenizer=tokenizer)
    return path


def test_score_is_the_cosine_with_its_caption(folder):
    scorer = load_scorer(folder)
    cosines = scorer.encode_images(IMAGES) @ scorer.encode_captions(CAPTIONS).T
    scores = scorer.score(IMAGES, CAPTIONS)
    assert (scores.shape, scores.dtype) == ((2,), torch.float32)
    torch.testing.assert_close(scores, cosines.diagonal())
    assert (scores.abs() <= 1.0 + 1e-6).all()


def test_images_are_resized_and_normalized(folder):
    scorer = load_scorer(folder)
    white = torch.full((1, 3, 64, 64), 255, dtype=torch.uint8)
    torch.testing.assert_close(scorer.prepare(white), torch.ones(1, 3, 64, 64))
    assert scorer.prepare(IMAGES).shape == (2, 3, 64, 64)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (IMAGES.float(), "uint8"),
        (IMAGES[:, 0], "uint8"),
        (IMAGES[:, :, :16], "crop them to a square"),
        (IMAGES[:1], "1 images and 2 captions"),
    ],
)
def test_wrong_images_are_refused(folder, images, message):
    with pytest.raises(ValueError, match=message):
        load_scorer(folder).score(images, CAPTIONS)


def test_a_folder_without_weights_is_refused(folder, tmp_path):
    (tmp_path / "open_clip_config.json").write_text((folder / "open_clip_config.json").read_text())
    with pytest.raises(ValueError, match=r"no model\.safetensors"):
        load_scorer(tmp_path)


def test_open_clip_models_are_loaded_by_name(tmp_path, caplog):
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 48, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    (tmp_path / "tiny-for-this-test.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path)
    weights = tmp_path / "weights.safetensors"
    save_file(open_clip.create_model("tiny-for-this-test").state_dict(), weights)
    caplog.clear()
    scorer = open_clip_scorer("tiny-for-this-test", weights=weights)
    assert "initialized randomly" not in caplog.text
    assert (scorer.image_size, scorer.mean) == (48, tuple(open_clip.OPENAI_DATASET_MEAN))
    assert scorer.score(IMAGES, CAPTIONS).shape == (2,)


@pytest.mark.parametrize(
    ("name", "file", "message"),
    [("ViT-none", "weights.safetensors", "no model"), ("ViT-g-14", "weights.bin", r"\.safetensors")],
)
def test_unknown_names_and_pickles_are_refused(tmp_path, name, file, message):
    (tmp_path / file).write_bytes(b"")
    with pytest.raises(ValueError, match=message):
        open_clip_scorer(name, weights=tmp_path / file)
