"""UNets and architectures: each made from the other, and weights inherited by name. SnapFusion Table 3."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any

# Of a model saved by version 0.1, diffusers looks for BlockUNet and its base class in this module.
from diffusers import ModelMixin, UNet2DConditionModel  # noqa: F401
from torch import nn

from snapfusion.models.architecture import Architecture, Layer, StageLayers, origin_of
from snapfusion.models.snapfusion_unet_v1 import BlockUNet

# Stock stages, and whether they have attention.
_DOWN = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
_UP = {"CrossAttnUpBlock2D": True, "UpBlock2D": False}
_MIDDLE = (Layer(resnet="0", attentions=("0",)), Layer(resnet="1"))
# Fields of an `Architecture` that a stock config has too, by their names there.
_CONFIG_NAMES = {
    "context": "cross_attention_dim",
    "groups": "norm_num_groups",
    "sample_size": "sample_size",
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "linear_projection": "use_linear_projection",
    "upcast_attention": "upcast_attention",
    "guidance_embedding": "time_cond_proj_dim",
}
# Fields of a stock config that hold the stages.
_STAGE_NAMES = ("block_out_channels", "layers_per_block", "down_block_types", "up_block_types")


class UNetError(ValueError):
    """A UNet that no `Architecture` describes, or weights that do not fit one."""


def architecture_of(unet: UNet2DConditionModel | BlockUNet) -> Architecture:
    """Return the architecture of a UNet of either class.

    Raises:
        UNetError: if it has a feature that Stable Diffusion v1 and v2 do not have.
    """
    config = unet.config
    if isinstance(unet, BlockUNet):
        return Architecture.parse(config["architecture"])
    described = ("self", "attention_head_dim", *_STAGE_NAMES, *_CONFIG_NAMES.values())
    for name, parameter in signature(UNet2DConditionModel.__init__).parameters.items():
        # What an `Architecture` does not describe is as by default in Stable Diffusion v1 and v2.
        if name not in described and config[name] != parameter.default:
            raise UNetError(f"the UNet has {name} = {config[name]!r}; {parameter.default!r} is accepted")
    for name, known in (("down_block_types", _DOWN), ("up_block_types", _UP)):
        if unknown := [kind for kind in config[name] if kind not in known]:
            raise UNetError(f"the UNet has a stage {unknown[0]}; {', '.join(known)} are accepted")
    return _stock_architecture(config)


def _stock_architecture(config: Mapping[str, Any]) -> Architecture:
    levels = len(config["block_out_channels"])
    heads, layers = config["attention_head_dim"], config["layers_per_block"]
    layers = [layers] * levels if isinstance(layers, int) else list(layers)
    return Architecture(
        channels=tuple(config["block_out_channels"]),
        heads=(heads,) * levels if isinstance(heads, int) else tuple(heads),
        down=tuple(
            _stock_stage(num_layers, attention=_DOWN[kind])
            for kind, num_layers in zip(config["down_block_types"], layers, strict=True)
        ),
        middle=_MIDDLE,
        up=tuple(
            _stock_stage(num_layers + 1, attention=_UP[kind])
            for kind, num_layers in zip(config["up_block_types"], reversed(layers), strict=True)
        ),
        **{field: config[name] for field, name in _CONFIG_NAMES.items()},
    )


def _stock_stage(num_layers: int, *, attention: bool) -> StageLayers:
    return tuple(
        Layer(resnet=str(number), attentions=(str(number),) if attention else (), skip=True)
        for number in range(num_layers)
    )


def resize_unet(unet: UNet2DConditionModel | BlockUNet, *, side: int) -> None:
    """Set the side of the latent in the config of a UNet. No weight depends on it."""
    config: dict[str, Any] = {"sample_size": side}
    if isinstance(unet, BlockUNet):
        config["architecture"] = {**unet.config["architecture"], "sample_size": side}
    unet.register_to_config(**config)


def block_unet(architecture: Architecture) -> BlockUNet:
    """Build a random `BlockUNet` of any architecture."""
    return BlockUNet(
        architecture=architecture.to_values(),
        sample_size=architecture.sample_size,
        in_channels=architecture.in_channels,
        time_cond_proj_dim=architecture.guidance_embedding,
    )


def build_unet(architecture: Architecture) -> UNet2DConditionModel | BlockUNet:
    """Build a random UNet: of diffusers' class if that supports the architecture, else a `BlockUNet`."""
    stock = stock_config(architecture)
    return block_unet(architecture) if stock is None else UNet2DConditionModel(**stock)


def stock_config(architecture: Architecture) -> dict[str, Any] | None:
    """Return the config of `UNet2DConditionModel` for this architecture, or None if there is none."""
    has_attention = [any(layer.attentions for layer in stage) for stage in architecture.down]
    down, up = ({attention: kind for kind, attention in kinds.items()} for kinds in (_DOWN, _UP))
    config = {
        **{name: getattr(architecture, field) for field, name in _CONFIG_NAMES.items()},
        "block_out_channels": architecture.channels,
        "layers_per_block": tuple(len(stage) for stage in architecture.down),
        "down_block_types": tuple(down[attention] for attention in has_attention),
        "up_block_types": tuple(up[attention] for attention in reversed(has_attention)),
        "attention_head_dim": architecture.heads,
    }
    # The config cannot express every architecture: it is used only if it leads back to this one.
    return config if _stock_architecture(config) == architecture else None


def inherit_weights(unet: nn.Module, source: nn.Module) -> list[str]:
    """Load the weights of each block of `unet` from `source`, or from the block that it is a copy of.

    Returns:
        The names of the blocks that `source` does not have, and whose origin was copied.

    Raises:
        UNetError: if `source` lacks a tensor or has it in another shape.
    """
    available, copied, weights = source.state_dict(), set(), {}
    for name, tensor in unet.state_dict().items():
        origin = name if name in available else _name_in_origin(name)
        if origin not in available:
            raise UNetError(f"the weights do not fit: there is no {origin}")
        theirs, ours = tuple(available[origin].shape), tuple(tensor.shape)
        if theirs != ours:
            raise UNetError(f"the weights do not fit: {origin} is {theirs} there, {ours} here")
        if origin != name:
            block, _, rest = name.partition("+")
            copied.add(f"{block}+{rest.partition('.')[0]}")
        weights[name] = available[origin]
    unet.load_state_dict(weights)
    return sorted(copied)


def _name_in_origin(name: str) -> str:
    return ".".join(origin_of(part) if "+" in part else part for part in name.split("."))
