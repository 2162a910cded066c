"""BlockUNet against stock diffusers and against skipped blocks; architectures and their costs."""

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel

from snapfusion.mini import models
from snapfusion.models import sd2, sd15
from snapfusion.models.architecture import Architecture, ArchitectureError, Layer, efficient_architecture
from snapfusion.models.blocks import blocks_of, skipping_blocks
from snapfusion.models.checksums import CHECKSUMS_FILE
from snapfusion.models.cost import block_count_table, costs_of
from snapfusion.models.guidance_embedding import EMBEDDING_SIZE, with_guidance_embedding
from snapfusion.models.load import ModelError, load
from snapfusion.models.save import save
from snapfusion.models.unet import (
    BlockUNet,
    UNetError,
    architecture_of,
    build_unet,
    inherit_weights,
    stock_config,
)
from snapfusion.settings import SettingsError


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return models.unet().eval()


@pytest.fixture(scope="module")
def origin(unet):
    return architecture_of(unet)


@pytest.fixture(scope="module")
def sd15_architecture():
    with torch.device("meta"):
        return architecture_of(UNet2DConditionModel(**sd15.UNET))


GENERATOR = torch.Generator().manual_seed(1)
INPUTS = {
    "sample": torch.randn(2, 4, 8, 8, generator=GENERATOR),
    "timestep": torch.tensor([10, 900]),
    "encoder_hidden_states": torch.randn(2, 24, models.TEXT_WIDTH, generator=GENERATOR),
}


@torch.inference_mode()
def output(unet, **more):
    return unet(**INPUTS, **more).sample


def inherited(architecture, source):
    unet = build_unet(architecture).eval()
    return unet, inherit_weights(unet, source)


def names(architecture):
    return [block.name for block in architecture.blocks]


def test_block_unet_matches_stock(unet, origin):
    ours = BlockUNet.of(origin).eval()
    assert inherit_weights(ours, unet) == []
    assert ours.state_dict().keys() == unet.state_dict().keys()
    assert torch.equal(output(ours), output(unet))


def test_w_conditioned_block_unet_matches_stock(unet):
    stock = with_guidance_embedding(unet)
    with torch.no_grad():
        stock.time_embedding.cond_proj.weight.normal_()
    ours = BlockUNet.of(architecture_of(stock)).eval()
    inherit_weights(ours, stock)
    w = torch.randn(2, EMBEDDING_SIZE)
    assert torch.equal(output(ours, timestep_cond=w), output(stock, timestep_cond=w))


def test_gradient_checkpointing_keeps_gradients(unet, origin):
    gradients = []
    for again in (False, True):
        ours = BlockUNet.of(efficient_architecture(origin))
        inherit_weights(ours, unet)
        if again:
            ours.enable_gradient_checkpointing()
        ours(**INPUTS).sample.square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in ours.named_parameters()})
    plain, recomputed = gradients
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


@pytest.mark.parametrize("name", names(architecture_of(models.unet())))
def test_removing_a_block_equals_skipping_it(name, unet, origin):
    smaller, _ = inherited(origin.without(name), unet)
    assert name not in {block.name for block in blocks_of(smaller)}
    with skipping_blocks(unet, [name]):
        assert torch.equal(output(smaller), output(unet))


def test_all_blocks_can_be_removed(unet, origin):
    rest = origin
    for name in reversed(names(origin)):
        rest = rest.without(name)
    assert rest.blocks == ()
    empty, _ = inherited(rest, unet)
    with skipping_blocks(unet, names(origin)):
        assert torch.equal(output(empty), output(unet))


def test_copy_inherits_weights_and_follows_its_origin(unet, origin):
    copied = [name for name in names(origin) if origin.can_copy(name)]
    assert {name.rpartition(".")[0] for name in copied} >= {"mid_block.attentions", "down_blocks.0.resnets"}
    for name in copied:
        larger, new = inherited(origin.with_copy(name), unet)
        assert new == [f"{name}+1"]
        order = names(origin.with_copy(name))
        assert order.index(f"{name}+1") == order.index(name) + 1
        mine, its = larger.get_submodule(f"{name}+1").state_dict(), unet.get_submodule(name).state_dict()
        assert all(torch.equal(mine[key], its[key]) for key in its)
        assert not torch.equal(output(larger), output(unet))
        with skipping_blocks(larger, new):
            assert torch.equal(output(larger), output(unet))


def test_copies_of_copies_are_distinct(origin):
    name = "mid_block.attentions.0"
    thrice = origin.with_copy(name).with_copy(f"{name}+1").with_copy(name)
    assert [block.name for block in thrice.blocks if block.stage == "mid_block"] == [
        "mid_block.resnets.0",
        *(name, f"{name}+3", f"{name}+1", f"{name}+2"),
        "mid_block.resnets.1",
    ]
    assert thrice.without(f"{name}+3").without(f"{name}+2").without(f"{name}+1") == origin


def test_block_that_changes_channels_has_no_copy(origin):
    assert not origin.can_copy("up_blocks.0.resnets.0")
    with pytest.raises(ArchitectureError, match="changes the number of channels"):
        origin.with_copy("up_blocks.0.resnets.0")
    with pytest.raises(ArchitectureError, match=r"no block 'mid_block.resnets.7'; its blocks are down_bl"):
        origin.without("mid_block.resnets.7")


def test_stock_class_is_used_where_possible(unet, origin):
    assert type(build_unet(origin)) is UNet2DConditionModel
    assert architecture_of(build_unet(origin)) == origin
    assert type(build_unet(origin.without("mid_block.attentions.0"))) is BlockUNet
    # One ResNet block fewer on each way, with its cross-attention, is a stock UNet of unequal stages.
    down, up = (*origin.down[:-1], origin.down[-1][:1]), (origin.up[0][:2], *origin.up[1:])
    fewer = origin.changed(down=down, up=up)
    assert stock_config(fewer)["layers_per_block"] == (2, 2, 1)
    assert architecture_of(build_unet(fewer)) == fewer


@pytest.mark.parametrize("config", [sd15.UNET, sd2.UNET])
def test_full_size_architectures_round_trip(config):
    with torch.device("meta"):
        stock = UNet2DConditionModel(**config)
        ours = BlockUNet.of(architecture_of(stock))
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


def test_table_3_needs_three_levels(origin):
    shallow = origin.changed(
        channels=(24, 64),
        heads=(4, 4),
        down=(origin.down[0], origin.down[2]),
        up=(origin.up[0], origin.up[2]),
    )
    with pytest.raises(ArchitectureError, match="at least three levels of channels; this UNet has 2"):
        efficient_architecture(shallow)


def test_efficient_miniature_inherits_weights(unet, origin):
    efficient, copied = inherited(efficient_architecture(origin), unet)
    assert copied == [f"up_blocks.1.attentions.{number}+1" for number in range(3)]
    assert torch.isfinite(output(efficient)).all()


def test_costs_add_up(origin):
    costs = costs_of(origin, tokens=24)
    stages = [costs.of_stage(stage) for stage in origin.stages]
    whole = sum(stages, costs.rest["ends"])
    assert whole == costs.total
    name = "down_blocks.0.attentions.1"
    smaller = costs_of(origin.without(name), tokens=24).total
    assert costs.total.parameters - smaller.parameters == costs.blocks[name].parameters
    assert costs.total.macs - smaller.macs == costs.blocks[name].macs


def test_macs_of_one_block(origin):
    """The middle's first ResNet block: two 3x3 convolutions on 2x2, and the time's projection."""
    width, pixels = 64, 4
    embedding = 4 * 24
    by_hand = 2 * 9 * width * width * pixels + embedding * width
    assert costs_of(origin).blocks["mid_block.resnets.0"].macs == by_hand


def test_saved_block_unet_loads(tmp_path):
    bundle = load("mini-v")
    origin = architecture_of(bundle.unet)
    bundle.unet, _ = inherited(efficient_architecture(origin), bundle.unet)
    expected = output(bundle.unet)
    save(bundle, tmp_path / "efficient", dtype=torch.float32)
    loaded = load(str(tmp_path / "efficient"))
    assert architecture_of(loaded.unet) == efficient_architecture(origin)
    assert torch.equal(output(loaded.unet), expected)
    assert loaded.latent_shape == (4, 8, 8)
    # Where this package is installed, stock diffusers finds the class by the name in model_index.json.
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "efficient")
    assert torch.equal(output(pipeline.unet), expected)


def test_weights_that_do_not_fit_fail(unet, origin):
    smaller, _ = inherited(origin.without("mid_block.attentions.0"), unet)
    with pytest.raises(UNetError, match=r"there is no mid_block\.attentions\.0\.\w+"):
        inherit_weights(build_unet(origin), smaller)
    other = build_unet(origin.changed(context=48))
    with pytest.raises(UNetError, match=r"attn2\.to_k\.weight is \(24, 48\) there, \(24, 64\) here"):
        inherit_weights(build_unet(origin), other)


def test_folder_with_invalid_architecture_fails(tmp_path, unet):
    bundle = load("mini")
    bundle.unet, _ = inherited(efficient_architecture(architecture_of(bundle.unet)), bundle.unet)
    save(bundle, tmp_path / "model")
    config = tmp_path / "model" / "unet" / "config.json"
    config.write_text(config.read_text().replace('"channels"', '"chanels"'))
    (tmp_path / "model" / CHECKSUMS_FILE).unlink()
    with pytest.raises(ModelError, match="unet's weights cannot be read: channels: Field required"):
        load(str(tmp_path / "model"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"middle": (Layer(resnet="0"), Layer(resnet="0"))},
            "resnets.0 is in the stage more than once",
        ),
        ({"heads": (4,)}, "3 levels of channels, 1 of heads"),
        (
            {"down": ((), (), ())},
            "has 1 skip connections, .*; up_blocks.2 uses 3",
        ),
        ({"middle": (Layer(resnet="0", whole=False),)}, "mid_block.resnets.0 keeps its channels"),
    ],
)
def test_invalid_architecture_fails(origin, change, message):
    with pytest.raises(ValueError, match=message):
        origin.changed(**change)


def test_layer_that_changes_channels_needs_a_block(origin):
    down = (origin.down[0], (Layer(skip=True), *origin.down[1][1:]), origin.down[2])
    with pytest.raises(
        ValueError, match=r"down_blocks.1: a layer without a ResNet block has 24 channels, not 64"
    ):
        origin.changed(down=down)
    with pytest.raises(SettingsError, match="layers"):
        Architecture.parse({**origin.to_values(), "layers": 2})


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
def test_unsupported_stock_unet_fails(unet, change, message):
    config = {name: value for name, value in unet.config.items() if not name.startswith("_")}
    with pytest.raises(UNetError, match=message):
        architecture_of(UNet2DConditionModel(**{**config, **change}))
