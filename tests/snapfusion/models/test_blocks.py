import pytest
import torch

from snapfusion.mini import models
from snapfusion.models.blocks import blocks_of, skipping_blocks
from snapfusion.models.sd15 import UNET
from snapfusion.models.unet import architecture_of


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return models.unet().eval()


@pytest.fixture(scope="module")
def output(unet):
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "sample": torch.randn(2, 4, 8, 8, generator=generator),
        "timestep": torch.tensor([10, 900]),
        "encoder_hidden_states": torch.randn(2, 24, models.TEXT_WIDTH, generator=generator),
    }
    return torch.inference_mode()(lambda: unet(**inputs).sample)


def test_sd15_has_the_blocks_of_table_3():
    """Table 3's column "Origin": its "Mid" row counts down-4, the middle and up-0 together."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        found = architecture_of(UNet2DConditionModel.from_config(UNET)).counts()
    assert [found[f"down_blocks.{i}", "attention"] for i in range(3)] == [2, 2, 2]
    assert [found[f"down_blocks.{i}", "resnet"] for i in range(3)] == [2, 2, 2]
    assert [found[f"up_blocks.{i}", "attention"] for i in (1, 2, 3)] == [3, 3, 3]
    middle = ("down_blocks.3", "mid_block", "up_blocks.0")
    assert sum(found[stage, "resnet"] for stage in middle) == 7
    assert found["mid_block", "attention"] == 1


def test_depth_counts_the_halvings(unet):
    depths = {block.stage: block.depth for block in blocks_of(unet)}
    assert depths["down_blocks.0"] == depths["up_blocks.2"] == 0
    assert depths["down_blocks.1"] == depths["up_blocks.1"] == 1
    assert depths["down_blocks.2"] == depths["up_blocks.0"] == depths["mid_block"] == 2


def test_skipping_each_block_ends_with_the_context(unet, output):
    whole = output()
    for block in blocks_of(unet):
        with skipping_blocks(unet, [block.name]):
            assert not torch.equal(output(), whole), block.name
    assert torch.equal(output(), whole)


def test_skipped_block_does_not_compute(unet, output):
    """NaN weights do not reach the output."""
    name = "down_blocks.0.attentions.0"
    weight = unet.get_submodule(name).proj_out.weight
    kept = weight.detach().clone()
    with skipping_blocks(unet, [name]):
        expected = output()
        with torch.no_grad():
            weight.fill_(float("nan"))
        assert torch.equal(output(), expected)
    with torch.no_grad():
        weight.copy_(kept)


def test_resnet_that_changes_channels_keeps_its_shortcut(unet):
    name = "up_blocks.2.resnets.0"
    resnet = unet.get_submodule(name)
    hidden = torch.randn(1, resnet.in_channels, 8, 8)
    with torch.inference_mode(), skipping_blocks(unet, [name]):
        assert torch.equal(resnet(hidden, torch.zeros(1, 1)), resnet.conv_shortcut(hidden))


def test_blocks_are_restored_after_an_error(unet, output):
    whole = output()
    with pytest.raises(KeyError), skipping_blocks(unet, ["mid_block.resnets.0"]):
        raise KeyError
    assert torch.equal(output(), whole)


def test_unknown_block_is_named(unet):
    with pytest.raises(ValueError, match="no block 'mid'"), skipping_blocks(unet, ["mid"]):
        pass
