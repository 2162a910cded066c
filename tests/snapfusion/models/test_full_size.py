"""The published architectures at full size, on the meta device."""

import functools

import pytest
import torch
from torch import nn

from snapfusion.models import random_weights, sd2, sd15
from snapfusion.models.errors import ModelError
from snapfusion.models.load import load
from snapfusion.models.random_weights import MODEL_CONFIGS, random_bundle
from snapfusion.models.tokenizer import clip_tokenizer, tokenize


@functools.cache
def on_meta(name):
    """A model without weights."""
    with torch.device("meta"):
        return random_bundle(name)


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def transformer(*, width: int, inner: int, layers: int, tokens: int = 49_408, positions: int = 77) -> int:
    """Parameters of CLIP's text model."""
    attention = 4 * (width * width + width)
    feed_forward = width * inner + inner + inner * width + width
    norm = 2 * width
    return (tokens + positions) * width + layers * (attention + feed_forward + 2 * norm) + norm


def test_sd15_parameters():
    bundle = on_meta("sd15")
    assert count(bundle.unet) == sd15.UNET_PARAMETERS == 859_520_964
    assert count(bundle.text_encoder) == transformer(width=768, inner=3072, layers=12) == 123_060_480


def test_sd2_parameters():
    """The keys and values of 16 cross-attentions are of captions of width 1024, not 768."""
    bundle = on_meta("sd2")
    cross_attentions = 5 * [320] + 5 * [640] + 6 * [1280]  # two on the way in, three out; one in the middle
    wider = sum(2 * width * (1024 - 768) for width in cross_attentions)
    assert count(bundle.unet) == sd15.UNET_PARAMETERS + wider == sd2.UNET_PARAMETERS == 865_910_724
    assert count(bundle.text_encoder) == transformer(width=1024, inner=4096, layers=23) == 340_387_840


def test_sd2_heads_are_64_wide():
    unet = on_meta("sd2").unet
    blocks = [module for module in unet.modules() if hasattr(module, "attn2")]
    assert {block.attn2.inner_dim / block.attn2.heads for block in blocks} == {64.0}
    assert {type(part.proj_in) for part in unet.modules() if hasattr(part, "proj_in")} == {nn.Linear}


@pytest.mark.parametrize("name", MODEL_CONFIGS)
@torch.inference_mode()
def test_networks_fit_together(name):
    bundle, size = on_meta(name), on_meta(name).image_size
    side = size // 8
    assert bundle.latent_shape == (4, side, side)
    with torch.device("meta"):
        c = bundle.encode_text(bundle.tokenize(["a red circle"]).to("meta"))
        latent = bundle.encode_images(torch.zeros(1, 3, size, size, dtype=torch.uint8))
        output = bundle.predict(latent, torch.zeros(1), c)
    assert output.shape == latent.shape == (1, *bundle.latent_shape)


def test_sd2_has_768_pixels_and_predicts_v():
    first, second = on_meta("sd15"), on_meta("sd2")
    assert (first.image_size, first.prediction_type) == (512, "epsilon")
    assert (second.image_size, second.prediction_type) == (768, "v_prediction")


def test_sd2_padding(tmp_path):
    """As in its published files: token 0, which "!" in a caption becomes too."""
    tokenizer = clip_tokenizer(padding=sd2.PADDING)
    expected = {
        "a red circle": [49406, 320, 736, 7117, 49407],
        "wow! a dog!!": [49406, 2781, 0, 320, 1929, 0, 0, 49407],
    }
    tokenizer.save_pretrained(tmp_path)
    for loaded in (tokenizer, type(tokenizer).from_pretrained(tmp_path)):
        for text, ids in expected.items():
            assert tokenize(loaded, [text])[0].tolist() == ids + [0] * (77 - len(ids))


def test_random_model_loads_by_name(monkeypatch):
    """With a tiny model instead of one of gigabytes."""
    from conftest import tiny_bundle

    monkeypatch.setattr("snapfusion.models.load.random_bundle", lambda name: tiny_bundle(seed=len(name)))
    bundle = load("random:sd2", dtype=torch.bfloat16)
    assert bundle.unet.dtype == torch.bfloat16
    assert bundle.fingerprint() == tiny_bundle(seed=3).fingerprint()


def test_unknown_architecture_fails():
    with pytest.raises(ModelError, match=r"random:sd3: .*random:sd15, random:sd15-v, random:sd2 are"):
        load("random:sd3")


def test_weights_follow_the_seed(monkeypatch):
    """Global random numbers that were drawn before change nothing."""
    narrow = {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4}
    small = random_weights.ModelConfig(
        text_encoder=sd15.TEXT_ENCODER
        | {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2},
        unet=sd15.UNET | narrow | {"attention_head_dim": 2},
        vae=sd15.VAE | narrow,
        padding="!",
        prediction_type="epsilon",
    )
    monkeypatch.setitem(random_weights.MODEL_CONFIGS, "small", small)
    first, again, other = (random_bundle("small", seed=seed).fingerprint() for seed in (1, 1, 2))
    assert first == again
    assert first["unet"] != other["unet"]
