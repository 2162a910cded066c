"""Robust training: the skipped blocks of a step, and their effect on its gradient. SnapFusion Eq. 5."""

import copy

import pytest
import torch
from conftest import tiny_bundle

from snapfusion.models.blocks import blocks_of, set_skipped_blocks, skipping_blocks
from snapfusion.models.unet import architecture_of, build_unet, inherit_weights
from snapfusion.schedule import Schedule
from snapfusion.training.batch import Batch
from snapfusion.training.captions import CaptionEncoder
from snapfusion.training.loop import new_state, train
from snapfusion.training.robust import RobustObjective, draw_skipped_blocks
from snapfusion.training.settings import LoopSettings, SkipSettings, VelocitySettings
from snapfusion.training.velocity import VelocityObjective

OFTEN = SkipSettings(attention=0.4, resnet=0.3)


@pytest.fixture(scope="module")
def bundle():
    return tiny_bundle(image_size=32)


@pytest.fixture(scope="module")
def plain(bundle):
    return VelocityObjective(VelocitySettings(), captions=CaptionEncoder(bundle), schedule=Schedule(), seed=3)


@pytest.fixture
def unet(bundle):
    return copy.deepcopy(bundle.unet).requires_grad_(requires_grad=True)


@pytest.fixture(scope="module")
def batch(bundle):
    generator = torch.Generator().manual_seed(0)
    ids = tuple(f"row-{number}" for number in range(6))
    latents = torch.randn(6, *bundle.latent_shape, generator=generator)
    return Batch(ids=ids, columns={"latent": latents, "token_ids": bundle.tokenize(["a red thing"] * 6)})


def gradients(unet, objective, batch, *, step):
    unet.zero_grad(set_to_none=True)
    objective(unet, batch, step=step).sum().backward()
    return {name: parameter.grad for name, parameter in unet.named_parameters()}


def test_skip_frequency_of_each_kind(unet):
    blocks = blocks_of(unet)
    draws = [draw_skipped_blocks(blocks, settings=OFTEN, seed=0, step=step) for step in range(2000)]
    for kind, probability in (("attention", 0.4), ("resnet", 0.3)):
        names = [block.name for block in blocks if block.kind == kind]
        for name in names:
            share = sum(name in skipped for skipped in draws) / len(draws)
            assert share == pytest.approx(probability, abs=4 * 0.5 / 2000**0.5), name
    first, second = ([names[i] in skipped for skipped in draws] for i in (0, 1))
    both = sum(a and b for a, b in zip(first, second, strict=True)) / len(draws)
    assert both == pytest.approx(0.3**2, abs=0.03)  # blocks are independent
    assert draw_skipped_blocks(blocks, settings=OFTEN, seed=0, step=7) == draws[7]
    assert draw_skipped_blocks(blocks, settings=OFTEN, seed=1, step=7) != draws[7]


def test_draws_of_a_block_ignore_other_blocks(unet):
    origin = architecture_of(unet)
    more = origin.with_copy("mid_block.attentions.0").without("up_blocks.1.attentions.0")
    names = {block.name for block in more.blocks}
    for step in range(50):
        draws = draw_skipped_blocks(origin.blocks, settings=OFTEN, seed=0, step=step)
        again = draw_skipped_blocks(more.blocks, settings=OFTEN, seed=0, step=step)
        assert [name for name in draws if name in names] == [name for name in again if "+" not in name]


def test_loss_is_that_without_the_blocks(unet, plain, batch):
    robust = RobustObjective(plain, settings=OFTEN, seed=0)
    for step in range(5):
        names = draw_skipped_blocks(blocks_of(unet), settings=OFTEN, seed=0, step=step)
        losses = robust(unet, batch, step=step)
        set_skipped_blocks(unet, ())
        with skipping_blocks(unet, names):
            assert torch.equal(losses, plain(unet, batch, step=step))
        assert not torch.equal(losses, plain(unet, batch, step=step))


def test_skipped_blocks_are_not_trained(unet, plain, batch):
    robust = RobustObjective(plain, settings=OFTEN, seed=0)
    names = draw_skipped_blocks(blocks_of(unet), settings=OFTEN, seed=0, step=0)
    assert names
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    settings = LoopSettings(num_steps=1, global_batch=6, learning_rate=1e-3)
    state = new_state(unet, settings=settings)
    train(state, objective=robust, batches=iter([batch]), settings=settings, micro_batch=2)
    unchanged = {name for name, tensor in unet.state_dict().items() if torch.equal(tensor, before[name])}
    # The shortcut of a ResNet block that changes channels remains, and learns.
    skipped = {
        name
        for name in before
        if name.startswith(tuple(f"{block}." for block in names)) and "conv_shortcut" not in name
    }
    assert skipped
    assert skipped <= unchanged
    assert not {name for name in unchanged - skipped if not before[name].eq(0).all()}


@pytest.mark.parametrize("own_class", [False, True])
def test_gradient_checkpointing_skips_the_same_blocks(own_class, unet, plain, batch):
    if own_class:
        evolved = architecture_of(unet).with_copy("mid_block.attentions.0")
        whole, unet = unet, build_unet(evolved.without("down_blocks.0.attentions.0"))
        inherit_weights(unet, whole)
    robust = RobustObjective(plain, settings=OFTEN, seed=0)
    for step in range(3):
        kept = gradients(unet, robust, batch, step=step)
        unet.enable_gradient_checkpointing()
        unet.train()
        again = gradients(unet, robust, batch, step=step)
        unet.disable_gradient_checkpointing()
        for name, gradient in kept.items():
            assert (gradient is None) == (again[name] is None), name
            assert gradient is None or torch.allclose(gradient, again[name], atol=1e-6), name


def test_probability_zero_is_the_plain_objective(unet, plain, batch):
    never = RobustObjective(plain, settings=SkipSettings(attention=0.0, resnet=0.0), seed=0)
    assert torch.equal(never(unet, batch, step=0), plain(unet, batch, step=0))


def test_skipping_lasts_until_the_next_call(unet, plain, batch):
    whole = plain(unet, batch, step=0)
    names = [block.name for block in blocks_of(unet)]
    set_skipped_blocks(unet, names[:3])
    assert not torch.equal(plain(unet, batch, step=0), whole)
    set_skipped_blocks(unet, names[3:5])
    with pytest.raises(ValueError, match="has no block 'nothing'"):
        set_skipped_blocks(unet, ["nothing"])
    set_skipped_blocks(unet, ())
    assert torch.equal(plain(unet, batch, step=0), whole)
