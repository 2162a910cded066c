"""A w-conditioned UNet: without effect at first, then guided in one pass, here and in stock diffusers."""

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
    bundle = tiny_bundle()
    bundle.prediction_type = "v_prediction"
    bundle.unet = with_guidance_embedding(bundle.unet)
    return bundle


@pytest.fixture
def trained(bundle):
    """With weights that depend on w."""
    torch.manual_seed(1)
    torch.nn.init.normal_(bundle.unet.time_embedding.cond_proj.weight, std=0.5)
    return bundle


@pytest.fixture
def inputs(bundle):
    z_t = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return z_t, torch.tensor([10, 500, 999]), bundle.encode_text(bundle.tokenize(["red"] * 3))


@torch.no_grad()
def test_output_does_not_depend_on_w_at_first(bundle, inputs):
    before = tiny_bundle().predict(*inputs)
    for w in (1.0, torch.tensor([1.0, 5.0, 14.0]).view(-1, 1, 1, 1)):
        assert torch.equal(bundle.predict(*inputs, w=w), before)
    assert has_guidance_embedding(bundle.unet)
    assert not has_guidance_embedding(tiny_bundle().unet)
    assert with_guidance_embedding(bundle.unet) is bundle.unet
    assert WEIGHT_NAME in bundle.unet.state_dict()


def test_embedding_matches_diffusers():
    w = torch.tensor([1.0, 2.5, 14.0])
    theirs = StableDiffusionPipeline.get_guidance_scale_embedding(None, w - 1.0, embedding_dim=256)
    torch.testing.assert_close(guidance_embedding(w), theirs, rtol=0, atol=1e-3)


@torch.no_grad()
def test_guidance_takes_one_pass_and_depends_on_w(trained, inputs):
    rows = []
    trained.unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    z_t, t, c = inputs
    x = {w: trained.denoiser(c, w=w)(z_t, t).x for w in (1.0, 3.0)}
    assert rows == [3, 3]
    assert not torch.allclose(x[1.0], x[3.0])
    mixed = trained.denoiser(c, w=torch.tensor([1.0, 3.0, 3.0]).view(-1, 1, 1, 1))(z_t, t).x
    torch.testing.assert_close(mixed[:1], x[1.0][:1], rtol=0, atol=1e-4)
    torch.testing.assert_close(mixed[1:], x[3.0][1:], rtol=0, atol=1e-4)


@torch.no_grad()
def test_saved_model_loads(trained, inputs, tmp_path):
    save(trained, tmp_path / "model", dtype=torch.float32)
    loaded = load(str(tmp_path / "model"))
    assert torch.equal(loaded.predict(*inputs, w=4.0), trained.predict(*inputs, w=4.0))
