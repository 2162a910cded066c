"""Channels-first attention computes what diffusers computes, without copies."""

from copy import deepcopy

import pytest
import torch
from conftest import tiny_bundle, tiny_student

from snapfusion.export.attention import ChannelsFirstTransformer, set_attention_layout
from snapfusion.export.coreml import compile_coreml
from snapfusion.export.coreml_package import describe_package
from snapfusion.export.modules import TextProgram, unet_module
from snapfusion.models.guidance_embedding import with_guidance_embedding
from snapfusion.models.unet import UNetError
from snapfusion.training.velocity import predict_velocity

LAYOUTS = ("diffusers", "channels-first", "split-heads")
SHAPES = {"condition_shape": (16, 16), "conditions": 2}


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    return torch.randn(2, 4, 8, 8), torch.tensor([437.0]), torch.randn(2, 16, 16)


def trained(unet):
    """Norms whose weights and biases are not 1 and 0."""
    with torch.no_grad():
        for parameter in unet.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return unet


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", [tiny_bundle, tiny_student])
@torch.inference_mode()
def test_every_layout_computes_diffusers_output(layout, model, inputs):
    unet = trained(model().unet)
    z_t, t, c = inputs
    module = unet_module(unet, **SHAPES, layout=layout)
    expected = unet(torch.cat([z_t[:1]] * 2), t, encoder_hidden_states=c).sample
    torch.testing.assert_close(module.network(z_t[:1], t, c), expected, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_linear_projections_of_stable_diffusion_2(inputs):
    config = dict(tiny_bundle().unet.config) | {"use_linear_projection": True}
    unet = trained(type(tiny_bundle().unet).from_config(config))
    z_t, t, c = inputs
    other = deepcopy(unet)
    set_attention_layout(other, layout="channels-first")
    expected = unet(z_t, t, encoder_hidden_states=c).sample
    torch.testing.assert_close(other(z_t, t, encoder_hidden_states=c).sample, expected, rtol=1e-4, atol=1e-5)


def test_the_model_is_unchanged_and_shares_its_weights():
    unet = tiny_student().unet
    before = {tensor.data_ptr() for tensor in unet.state_dict().values()}
    network = unet_module(unet, **SHAPES, layout="channels-first").network
    assert not any(isinstance(part, ChannelsFirstTransformer) for part in unet.modules())
    assert sum(isinstance(part, ChannelsFirstTransformer) for part in network.modules()) == 2
    assert {tensor.data_ptr() for tensor in network.state_dict().values()} == before


@pytest.mark.slow
def test_channels_first_transposes_the_condition_only(tmp_path):
    transposes = {}
    for layout in LAYOUTS:
        package = tmp_path / f"{layout}.mlpackage"
        compile_coreml(unet_module(tiny_student().unet, **SHAPES, layout=layout), package)
        transposes[layout] = describe_package(package).operations.get("transpose", 0)
    assert transposes["channels-first"] == transposes["split-heads"] == 1
    assert transposes["diffusers"] >= 20


def test_guidance_embedding_takes_one_condition_and_w():
    unet = with_guidance_embedding(tiny_student().unet)
    torch.nn.init.normal_(unet.time_embedding.cond_proj.weight)
    for given in ({}, {"w": 2.0}):
        with pytest.raises(UNetError, match="guidance embedding: its program takes one condition"):
            unet_module(unet, **SHAPES, **given)
    inputs = torch.randn(1, 4, 8, 8), torch.tensor([499.0]), torch.randn(1, 16, 16)
    with torch.inference_mode():
        for w in (2.0, 6.0):
            module = unet_module(unet, condition_shape=(16, 16), conditions=1, w=w)
            expected = predict_velocity(unet, *inputs, w=torch.tensor([w]))
            torch.testing.assert_close(module.network(*inputs), expected)


@torch.inference_mode()
def test_text_program_has_a_causal_mask():
    bundle = tiny_bundle()
    program = TextProgram(bundle.text_encoder, length=16).eval()
    ids = bundle.tokenize(["red", "a red thing"]).int()
    for row in ids:
        expected = bundle.encode_text(row[None].long())
        torch.testing.assert_close(program(row[None]), expected, rtol=1e-5, atol=1e-6)
    changed = ids[:1].clone()
    changed[0, 9:] = 3
    torch.testing.assert_close(program(changed)[:, :9], program(ids[:1])[:, :9])
