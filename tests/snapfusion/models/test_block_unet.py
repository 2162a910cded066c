"""BlockUNet against stock diffusers and against skipped blocks; architectures and their costs."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from snapfusion.mini import models
from snapfusion.models import sd2, sd15
from snapfusion.models.architecture import Architecture, ArchitectureError, Layer, efficient_architecture
from snapfusion.models.blocks import blocks_of, skipping_blocks
from snapfusion.models.checksums import CHECKSUMS_FILE
from snapfusion.models.cost import block_count_table, costs_of
from snapfusion.models.errors import ModelError
from snapfusion.models.guidance_embedding import EMBEDDING_SIZE, with_guidance_embedding
from snapfusion.models.load import load
from snapfusion.models.save import save
from snapfusion.models.snapfusion_unet_v1 import BlockUNet
from snapfusion.models.unet import (
    UNetError,
    architecture_of,
    block_unet,
    build_unet,
    inherit_weights,
    stock_config,
)
from snapfusion.settings import SettingsError

torch.manual_seed(0)
UNET = models.unet().eval()
ORIGIN = architecture_of(UNET)
EFFICIENT = efficient_architecture(ORIGIN)
INPUTS = {
    "sample": torch.randn(2, 4, 8, 8),
    "timestep": torch.tensor([10, 900]),
    "encoder_hidden_states": torch.randn(2, 24, models.TEXT_WIDTH),
}


@pytest.fixture(scope="module")
def sd15_architecture():
    with torch.device("meta"):
        return architecture_of(UNet2DConditionModel(**sd15.UNET))


@torch.inference_mode()
def output(unet=UNET, **more):
    return unet(**INPUTS, **more).sample


def inherited(architecture, source=UNET):
    unet = build_unet(architecture).eval()
    return unet, inherit_weights(unet, source)


def names(architecture):
    return [block.name for block in architecture.blocks]


def test_block_unet_matches_stock():
    ours = block_unet(ORIGIN).eval()
    assert inherit_weights(ours, UNET) == []
    assert ours.state_dict().keys() == UNET.state_dict().keys()
    assert torch.equal(output(ours), output())


def test_w_conditioned_block_unet_matches_stock():
    stock = with_guidance_embedding(UNET)
    with torch.no_grad():
        stock.time_embedding.cond_proj.weight.normal_()
    ours = block_unet(architecture_of(stock)).eval()
    inherit_weights(ours, stock)
    w = torch.randn(2, EMBEDDING_SIZE)
    assert torch.equal(output(ours, timestep_cond=w), output(stock, timestep_cond=w))


def test_gradient_checkpointing_keeps_gradients():
    gradients = []
    for again in (False, True):
        ours = block_unet(EFFICIENT)
        inherit_weights(ours, UNET)
        if again:
            ours.enable_gradient_checkpointing()
        ours(**INPUTS).sample.square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in ours.named_parameters()})
    plain, recomputed = gradients
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


@pytest.mark.parametrize("name", names(ORIGIN))
def test_removing_a_block_equals_skipping_it(name):
    smaller, _ = inherited(ORIGIN.without(name))
    assert name not in {block.name for block in blocks_of(smaller)}
    with skipping_blocks(UNET, [name]):
        assert torch.equal(output(smaller), output())


def test_all_blocks_can_be_removed():
    rest = ORIGIN
    for name in reversed(names(ORIGIN)):
        rest = rest.without(name)
    assert rest.blocks == ()
    empty, _ = inherited(rest)
    with skipping_blocks(UNET, names(ORIGIN)):
        assert torch.equal(output(empty), output())


def test_copy_inherits_weights_and_follows_its_origin():
    copied = [name for name in names(ORIGIN) if ORIGIN.can_copy(name)]
    assert {name.rpartition(".")[0] for name in copied} >= {"mid_block.attentions", "down_blocks.0.resnets"}
    for name in copied:
        larger, new = inherited(ORIGIN.with_copy(name))
        assert new == [f"{name}+1"]
        order = names(ORIGIN.with_copy(name))
        assert order.index(f"{name}+1") == order.index(name) + 1
        mine, its = larger.get_submodule(f"{name}+1").state_dict(), UNET.get_submodule(name).state_dict()
        assert all(torch.equal(mine[key], its[key]) for key in its)
        assert not torch.equal(output(larger), output())
        with skipping_blocks(larger, new):
            assert torch.equal(output(larger), output())


def test_copies_of_copies_are_distinct():
    name = "mid_block.attentions.0"
    thrice = ORIGIN.with_copy(name).with_copy(f"{name}+1").with_copy(name)
    assert [block.name for block in thrice.blocks if block.stage == "mid_block"] == [
        "mid_block.resnets.0",
        *(name, f"{name}+3", f"{name}+1", f"{name}+2"),
        "mid_block.resnets.1",
    ]
    assert thrice.without(f"{name}+3").without(f"{name}+2").without(f"{name}+1") == ORIGIN


def test_block_that_changes_channels_has_no_copy():
    assert not ORIGIN.can_copy("up_blocks.0.resnets.0")
    with pytest.raises(ArchitectureError, match="changes the number of channels"):
        ORIGIN.with_copy("up_blocks.0.resnets.0")
    with pytest.raises(ArchitectureError, match=r"no block 'mid_block.resnets.7'; its blocks are down_bl"):
        ORIGIN.without("mid_block.resnets.7")


def test_stock_class_is_used_where_possible():
    assert type(build_unet(ORIGIN)) is UNet2DConditionModel
    assert architecture_of(build_unet(ORIGIN)) == ORIGIN
    assert type(build_unet(ORIGIN.without("mid_block.attentions.0"))) is BlockUNet
    # One ResNet block fewer on each way, with its cross-attention, is a stock UNet of unequal stages.
    down, up = (*ORIGIN.down[:-1], ORIGIN.down[-1][:1]), (ORIGIN.up[0][:2], *ORIGIN.up[1:])
    fewer = ORIGIN.changed(down=down, up=up)
    assert stock_config(fewer)["layers_per_block"] == (2, 2, 1)
    assert architecture_of(build_unet(fewer)) == fewer


@pytest.mark.parametrize("config", [sd15.UNET, sd2.UNET])
def test_full_size_architectures_round_trip(config):
    with torch.device("meta"):
        stock = UNet2DConditionModel(**config)
        ours = block_unet(architecture_of(stock))
        again = build_unet(architecture_of(stock))
    shapes = {name: tensor.shape for name, tensor in stock.state_dict().items()}
    for other in (ours, again):
        assert {name: tensor.shape for name, tensor in other.state_dict().items()} == shapes
    assert architecture_of(again) == architecture_of(stock)


def test_efficient_architecture_is_table_3(sd15_architecture):
    """The paper's table, row by row; "Mid" is all that is at the deepest resolution."""
    attention, resnet = "Cross Attention", "ResNet"
    assert block_count_table(sd15_architecture, efficient_architecture(sd15_architecture)) == [
        ("Down-1", 64, attention, 320, 2, 0),
        ("Down-1", 64, resnet, 320, 2, 2),
        ("Down-2", 32, attention, 640, 2, 2),
        ("Down-2", 32, resnet, 640, 2, 2),
        ("Down-3", 16, attention, 1280, 2, 2),
        ("Down-3", 16, resnet, 1280, 2, 1),
        ("Mid", 8, attention, 1280, 1, 1),
        ("Mid", 8, resnet, 1280, 7, 4),
        ("Up-1", 16, attention, 1280, 3, 6),
        ("Up-1", 16, resnet, 1280, 3, 2),
        ("Up-2", 32, attention, 640, 3, 3),
        ("Up-2", 32, resnet, 640, 3, 3),
        ("Up-3", 64, attention, 320, 3, 0),
        ("Up-3", 64, resnet, 320, 3, 3),
    ]


def test_parameters_of_full_size(sd15_architecture):
    """Table 1 says 848M of the efficient UNet; Table 3, read literally, has 759M."""
    ours = efficient_architecture(sd15_architecture)
    assert costs_of(sd15_architecture).total.parameters == sd15.UNET_PARAMETERS
    assert costs_of(ours).total.parameters == 759_327_364
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in build_unet(ours).parameters()) == 759_327_364


def test_table_3_needs_three_levels():
    down, up = (ORIGIN.down[0], ORIGIN.down[2]), (ORIGIN.up[0], ORIGIN.up[2])
    shallow = ORIGIN.changed(channels=(24, 64), heads=(4, 4), down=down, up=up)
    with pytest.raises(ArchitectureError, match="at least three levels of channels; this UNet has 2"):
        efficient_architecture(shallow)


def test_efficient_miniature_inherits_weights():
    efficient, copied = inherited(EFFICIENT)
    assert copied == [f"up_blocks.1.attentions.{number}+1" for number in range(3)]
    assert torch.isfinite(output(efficient)).all()


def test_costs_add_up():
    costs = costs_of(ORIGIN, tokens=24)
    assert sum((costs.of_stage(stage) for stage in ORIGIN.stages), costs.rest["ends"]) == costs.total
    name = "down_blocks.0.attentions.1"
    assert costs.total - costs_of(ORIGIN.without(name), tokens=24).total == costs.blocks[name]


def test_macs_of_one_block():
    """The first ResNet block of the middle: two 3x3 convolutions on 2x2, and the timestep projection."""
    width, pixels, embedding = 64, 4, 4 * 24
    expected = 2 * 9 * width * width * pixels + embedding * width
    assert costs_of(ORIGIN).blocks["mid_block.resnets.0"].macs == expected


def test_saved_block_unet_loads(tmp_path):
    bundle = load("mini-v")
    bundle.unet, _ = inherited(EFFICIENT, bundle.unet)
    expected = output(bundle.unet)
    save(bundle, tmp_path / "efficient", dtype=torch.float32)
    loaded = load(str(tmp_path / "efficient"))
    assert architecture_of(loaded.unet) == EFFICIENT
    assert torch.equal(output(loaded.unet), expected)
    assert loaded.latent_shape == (4, 8, 8)


def test_weights_that_do_not_fit_fail():
    smaller, _ = inherited(ORIGIN.without("mid_block.attentions.0"))
    with pytest.raises(UNetError, match=r"there is no mid_block\.attentions\.0\.\w+"):
        inherit_weights(build_unet(ORIGIN), smaller)
    other = build_unet(ORIGIN.changed(context=48))
    with pytest.raises(UNetError, match=r"attn2\.to_k\.weight is \(24, 48\) there, \(24, 64\) here"):
        inherit_weights(build_unet(ORIGIN), other)


def test_folder_with_invalid_architecture_fails(tmp_path):
    bundle = load("mini")
    bundle.unet, _ = inherited(EFFICIENT, bundle.unet)
    save(bundle, tmp_path / "model")
    config = tmp_path / "model" / "unet" / "config.json"
    config.write_text(config.read_text().replace('"channels"', '"chanels"'))
    (tmp_path / "model" / CHECKSUMS_FILE).unlink()
    with pytest.raises(ModelError, match="unet's weights cannot be read: channels: Field required"):
        load(str(tmp_path / "model"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"middle": (Layer(resnet="0"), Layer(resnet="0"))}, "resnets.0 is in the stage more than once"),
        ({"heads": (4,)}, "3 levels of channels, 1 of heads"),
        ({"down": ((), (), ())}, "has 1 skip connections, .*; up_blocks.2 uses 3"),
        ({"middle": (Layer(resnet="0", whole=False),)}, "mid_block.resnets.0 keeps its channels"),
    ],
)
def test_invalid_architecture_fails(change, message):
    with pytest.raises(ValueError, match=message):
        ORIGIN.changed(**change)


def test_layer_that_changes_channels_needs_a_block():
    down = (ORIGIN.down[0], (Layer(skip=True), *ORIGIN.down[1][1:]), ORIGIN.down[2])
    with pytest.raises(ValueError, match=r"down_blocks.1: a layer .* has 24 channels, not 64"):
        ORIGIN.changed(down=down)
    with pytest.raises(SettingsError, match="layers"):
        Architecture.parse({**ORIGIN.to_values(), "layers": 2})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_embed_type": "timestep"}, "class_embed_type = 'timestep'; None is accepted"),
        (
            {"down_block_types": ("AttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")},
            "a stage AttnDownBlock2D; CrossAttnDownBlock2D, DownBlock2D are",
        ),
    ],
)
def test_unsupported_stock_unet_fails(change, message):
    config = {name: value for name, value in UNET.config.items() if not name.startswith("_")}
    with pytest.raises(UNetError, match=message):
        architecture_of(UNet2DConditionModel(**{**config, **change}))


def test_depth_counts_the_halvings():
    depths = {block.stage: block.depth for block in blocks_of(UNET)}
    assert depths["down_blocks.0"] == depths["up_blocks.2"] == 0
    assert depths["down_blocks.1"] == depths["up_blocks.1"] == 1
    assert depths["down_blocks.2"] == depths["up_blocks.0"] == depths["mid_block"] == 2


def test_skipping_each_block_ends_with_the_context():
    whole = output()
    for block in blocks_of(UNET):
        with skipping_blocks(UNET, [block.name]):
            assert not torch.equal(output(), whole), block.name
    assert torch.equal(output(), whole)


def test_skipped_block_does_not_compute():
    """NaN weights do not reach the output."""
    name = "down_blocks.0.attentions.0"
    weight = UNET.get_submodule(name).proj_out.weight
    kept = weight.detach().clone()
    with skipping_blocks(UNET, [name]):
        expected = output()
        with torch.no_grad():
            weight.fill_(float("nan"))
        assert torch.equal(output(), expected)
    with torch.no_grad():
        weight.copy_(kept)


def test_resnet_that_changes_channels_keeps_its_shortcut():
    name = "up_blocks.2.resnets.0"
    resnet = UNET.get_submodule(name)
    hidden = torch.randn(1, resnet.in_channels, 8, 8)
    with torch.inference_mode(), skipping_blocks(UNET, [name]):
        assert torch.equal(resnet(hidden, torch.zeros(1, 1)), resnet.conv_shortcut(hidden))


def test_blocks_are_restored_after_an_error():
    whole = output()
    with pytest.raises(KeyError), skipping_blocks(UNET, ["mid_block.resnets.0"]):
        raise KeyError
    assert torch.equal(output(), whole)


def test_unknown_block_is_named():
    with pytest.raises(ValueError, match="no block 'mid'"), skipping_blocks(UNET, ["mid"]):
        pass
