"""Attention with channels before positions computes what diffusers computes, and moves nothing."""

from copy import deepcopy

import pytest
import torch
from conftest import tiny_bundle, tiny_student

from snapfusion.export.attention import ChannelsFirstTransformer, set_attention_layout
from snapfusion.export.coreml import compile_coreml, describe_package
from snapfusion.export.modules import TextProgram, unet_module
from snapfusion.models.guidance_embedding import with_guidance_embedding
from snapfusion.models.unet import UNetError

FORMS = ("diffusers", "channels-first", "split-heads")


def given(seed=0):
    torch.manual_seed(seed)
    return torch.randn(2, 4, 8, 8), torch.tensor([437.0]), torch.randn(2, 16, 16)


def spread(unet):
    """Norms whose weights and biases are not 1 and 0, as training leaves them."""
    with torch.no_grad():
        for parameter in unet.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return unet


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("model", [tiny_bundle, tiny_student])
@torch.inference_mode()
def test_every_form_computes_what_diffusers_computes(form, model):
    unet = spread(model().unet)
    z_t, t, c = given()
    module = unet_module(unet, condition_shape=(16, 16), conditions=2, form=form)
    both = torch.cat([z_t[:1]] * 2)
    wanted = unet(both, t, encoder_hidden_states=c).sample
    torch.testing.assert_close(module.network(z_t[:1], t, c), wanted, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_linear_projections_of_stable_diffusion_2_too():
    config = dict(tiny_bundle().unet.config) | {"use_linear_projection": True}
    unet = spread(type(tiny_bundle().unet).from_config(config))
    z_t, t, c = given()
    other = deepcopy(unet)
    set_attention_layout(other, form="channels-first")
    wanted = unet(z_t, t, encoder_hidden_states=c).sample
    torch.testing.assert_close(other(z_t, t, encoder_hidden_states=c).sample, wanted, rtol=1e-4, atol=1e-5)


def test_the_model_is_left_as_it_is_and_shares_its_weights():
    unet = tiny_student().unet
    before = {name: tensor.data_ptr() for name, tensor in unet.state_dict().items()}
    module = unet_module(unet, condition_shape=(16, 16), conditions=2, form="channels-first")
    assert not any(isinstance(part, ChannelsFirstTransformer) for part in unet.modules())
    assert sum(isinstance(part, ChannelsFirstTransformer) for part in module.network.modules()) == 2
    assert {tensor.data_ptr() for tensor in module.network.state_dict().values()} == set(before.values())


def test_a_program_with_channels_first_moves_the_caption_alone(tmp_path):
    moved = {}
    for form in FORMS:
        unet = unet_module(tiny_student().unet, condition_shape=(16, 16), conditions=2, form=form)
        compile_coreml(unet, tmp_path / f"{form}.mlpackage")
        moved[form] = describe_package(tmp_path / f"{form}.mlpackage").operations.get("transpose", 0)
    assert moved["channels-first"] == moved["split-heads"] == 1
    assert moved["diffusers"] >= 20


def test_a_unet_that_is_told_the_guidance_is_refused():
    with pytest.raises(UNetError, match="the UNet is told the guidance scale"):
        unet_module(with_guidance_embedding(tiny_student().unet), condition_shape=(16, 16), conditions=2)


@torch.inference_mode()
def test_the_text_programs_mask_lets_no_word_see_a_later_one():
    bundle = tiny_bundle()
    program = TextProgram(bundle.text_encoder, length=16).eval()
    ids = bundle.tokenize(["red", "a red thing"]).int()
    for row in ids:
        torch.testing.assert_close(
            program(row[None]), bundle.encode_text(row[None].long()), rtol=1e-5, atol=1e-6
        )
    changed = ids[:1].clone()
    changed[0, 9:] = 3
    torch.testing.assert_close(program(changed)[:, :9], program(ids[:1])[:, :9])
