"""PickScore and HPSv2 score as their authors do, from weights of the published shape."""

import open_clip
import pytest
import torch
from preference_files import TINY, in_transformers, write_preferences
from transformers import CLIPImageProcessor, CLIPModel

from snapfusion.metrics.clip import open_clip_config
from snapfusion.metrics.preference import TransformersClip, preference_scorer, transformers_config
from snapfusion.models.tokenizer import clip_tokenizer

CAPTIONS = ["a small red ring", "a large blue cross, isn't it"]


def of_images(side: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, 3, side, side), generator=random, dtype=torch.uint8)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder with the same random network in the files of both libraries."""
    folder = tmp_path_factory.mktemp("weights")
    write_preferences(folder)
    return folder


def scorer_of(name, weights):
    return preference_scorer(name, shape=TINY, weights=weights / f"{name}.safetensors")


def test_hpsv2_is_the_cosine_of_open_clip(weights):
    scorer = scorer_of("hpsv2", weights)
    with torch.inference_mode():
        image, text, scale = scorer.model(
            scorer.prepare(of_images(56)), open_clip.get_tokenizer(TINY)(CAPTIONS)
        )
    torch.testing.assert_close(scorer.score(of_images(56), CAPTIONS), (image @ text.T).diagonal())
    assert scale > 10.0


def test_pickscore_is_the_logit_of_transformers(weights):
    scorer = scorer_of("pickscore", weights)
    network = CLIPModel(transformers_config(TINY)).eval()
    tokens = clip_tokenizer()(CAPTIONS, padding=True, truncation=True, max_length=77, return_tensors="pt")
    processor = CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    pixels = processor(list(of_images(56)), return_tensors="pt")
    network.load_state_dict(scorer.model.network.state_dict())
    with torch.inference_mode():
        logits = network(**tokens, **pixels).logits_per_image
    torch.testing.assert_close(scorer.score(of_images(56), CAPTIONS), logits.diagonal(), rtol=1e-4, atol=1e-4)


def test_both_libraries_read_the_same_network(weights):
    hpsv2, pickscore = (scorer_of(name, weights) for name in ("hpsv2", "pickscore"))
    scale = hpsv2.model.logit_scale.exp()
    images = of_images(80)
    expected = scale * hpsv2.score(images, CAPTIONS)
    torch.testing.assert_close(pickscore.score(images, CAPTIONS), expected, rtol=1e-4, atol=1e-4)
    assert abs(expected[0] - expected[1]) > 1e-2


def test_published_shape_has_its_published_size():
    assert open_clip_config("ViT-H-14")["vision_cfg"]["layers"] == 32
    with torch.device("meta"):
        theirs = TransformersClip(transformers_config("ViT-H-14"))
        ours = open_clip.create_model("ViT-H-14", device="meta")
    counts = [sum(parameter.numel() for parameter in model.parameters()) for model in (theirs, ours)]
    assert counts == [986_109_441, 986_109_441]
    shapes = {name: tuple(value.shape) for name, value in ours.state_dict().items()}
    expected = in_transformers({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    found = {name: tuple(value.shape) for name, value in theirs.network.state_dict().items()}
    assert found == {name: tuple(value.shape) for name, value in expected.items()}


@pytest.mark.parametrize(
    ("name", "other", "message"),
    [
        ("pickscore", "hpsv2", f"does not hold a CLIPModel of shape {TINY}: Missing key"),
        ("hpsv2", "pickscore", f"does not hold open_clip's {TINY}: Missing key"),
    ],
)
def test_weights_of_another_network_are_refused(weights, name, other, message):
    with pytest.raises(ValueError, match=message) as refused:
        preference_scorer(name, shape=TINY, weights=weights / f"{other}.safetensors")
    assert "\n" not in str(refused.value)


def test_damaged_weights_are_refused(weights, tmp_path):
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes((weights / "hpsv2.safetensors").read_bytes()[:1000])
    with pytest.raises(ValueError, match="is damaged"):
        preference_scorer("hpsv2", shape=TINY, weights=damaged)


def test_unknown_shapes_are_refused(weights):
    for name in ("hpsv2", "pickscore"):
        with pytest.raises(ValueError, match="open_clip has no model 'ViT-none'"):
            preference_scorer(name, shape="ViT-none", weights=weights / "hpsv2.safetensors")
