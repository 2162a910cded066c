"""The GAN's head: its layers at SD-v1.5's size, its seed, and the features that it reads."""

import pytest
import torch
from conftest import tiny_bundle

from snapfusion.models.cost import count_parameters
from snapfusion.models.gan_head import GanHead, head_for, middle_features
from snapfusion.models.unet import architecture_of, block_unet


def test_head_of_sd15_has_the_published_layers():
    with torch.device("meta"):
        head = GanHead(1280, side=8, seed=0)
        features = torch.empty(2, 1280, 8, 8)
    # Two convolutions of 4 x 4, two norms, and one of 1 x 1 to a number.
    assert count_parameters(head) == 2 * (16 * 1280**2 + 1280) + 2 * 2 * 1280 + 1281
    assert head(features).shape == (2,)
    sizes = [tuple(layer.shape[2:]) for layer in head.parameters() if layer.dim() == 4]
    assert sizes == [(4, 4), (4, 4), (1, 1)]


def test_features_of_any_shape_give_one_number():
    head = GanHead(16, side=4, seed=0)
    logits = [head(torch.randn(3, 16, *shape)) for shape in ((4, 4), (2, 3), (8, 4))]
    assert all(each.shape == (3,) and each.isfinite().all() for each in logits)
    with pytest.raises(ValueError, match="has 1 x 1 features; the GAN needs at least 2 x 2"):
        GanHead(16, side=1, seed=0)


def test_seed_alone_determines_the_weights():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again, other = (GanHead(16, side=2, seed=seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["layers.0.weight"], other["layers.0.weight"])


def test_both_classes_of_unet_give_the_same_features():
    stock = tiny_bundle().unet
    own = block_unet(architecture_of(stock)).eval()
    own.load_state_dict(stock.state_dict())
    inputs, c = (torch.randn(2, 4, 8, 8), torch.tensor([5, 900])), torch.randn(2, 16, 16)
    collected = []
    for unet in (stock, own):
        with middle_features(unet) as features:
            unet(*inputs, encoder_hidden_states=c)
            unet(*inputs, encoder_hidden_states=c)
        unet(*inputs, encoder_hidden_states=c)
        assert len(features) == 2
        collected.append(features[0])
    assert collected[0].shape == (2, 8, 4, 4)
    torch.testing.assert_close(*collected)
    assert head_for(stock, seed=0)(collected[0]).shape == (2,)
