"""A UNet that is told w: at first it does not heed it; then one pass, here and in stock diffusers."""

import pytest
import torch
from conftest import tiny_bundle
from diffusers import StableDiffusionPipeline

from snapfusion.models.guidance_embedding import (
    WEIGHT_NAME,
    guidance_embedding,
    has_guidance_embedding,
    with_guidance_embedding,
)
from snapfusion.models.load import load
from snapfusion.models.save import save


@pytest.fixture
def bundle():
    made = tiny_bundle()
    made.prediction_type = "v_prediction"
    made.unet = with_guidance_embedding(made.unet)
    return made


def asked(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 4, 8, 8, generator=generator), torch.tensor([10, 500, 999])


def heed(bundle):
    torch.manual_seed(1)
    torch.nn.init.normal_(bundle.unet.time_embedding.cond_proj.weight, std=0.5)
    return bundle


@torch.no_grad()
def test_at_first_it_says_what_it_said_before_whatever_w(bundle):
    z_t, t = asked()
    c = bundle.encode_text(bundle.tokenize(["red"] * 3))
    before = tiny_bundle().predict(z_t, t, c)
    for w in (1.0, torch.tensor([1.0, 5.0, 14.0]).view(-1, 1, 1, 1)):
        assert torch.equal(bundle.predict(z_t, t, c, w=w), before)
    assert has_guidance_embedding(bundle.unet)
    assert not has_guidance_embedding(tiny_bundle().unet)
    assert with_guidance_embedding(bundle.unet) is bundle.unet
    assert WEIGHT_NAME in bundle.unet.state_dict()


def test_the_scale_is_told_as_diffusers_tells_it():
    w = torch.tensor([1.0, 2.5, 14.0])
    theirs = StableDiffusionPipeline.get_guidance_scale_embedding(None, w - 1.0, embedding_dim=256)
    torch.testing.assert_close(guidance_embedding(w), theirs, rtol=0, atol=1e-3)


@torch.no_grad()
def test_guided_it_takes_one_pass_and_heeds_w(bundle):
    heed(bundle)
    rows = []
    bundle.unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    z_t, t = asked()
    c = bundle.encode_text(bundle.tokenize(["red"] * 3))
    said = {w: bundle.denoiser(c, w=w)(z_t, t).x for w in (1.0, 3.0)}
    assert rows == [3, 3]
    assert not torch.allclose(said[1.0], said[3.0])
    each = torch.tensor([1.0, 3.0, 3.0]).view(-1, 1, 1, 1)
    mixed = bundle.denoiser(c, w=each)(z_t, t).x
    torch.testing.assert_close(mixed[:1], said[1.0][:1], rtol=0, atol=1e-4)
    torch.testing.assert_close(mixed[1:], said[3.0][1:], rtol=0, atol=1e-4)


@torch.no_grad()
def test_it_is_saved_and_opens_again(bundle, tmp_path):
    save(heed(bundle), tmp_path / "told", dtype=torch.float32)
    z_t, t = asked()
    c = bundle.encode_text(bundle.tokenize(["red"] * 3))
    again = load(str(tmp_path / "told"))
    assert torch.equal(again.predict(z_t, t, c, w=4.0), bundle.predict(z_t, t, c, w=4.0))
