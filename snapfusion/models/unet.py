"""A UNet built from its `Architecture`: diffusers' blocks in any arrangement. SnapFusion Sec. 3.1, Table 3.

Tensor names are those of `UNet2DConditionModel`, so weights are interchangeable for blocks that both have.
"""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from snapfusion.models.architecture import ATTENTION_FIELDS, Architecture, Layer, StageLayers, origin_of

NORM_EPS = 1e-5

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


class Shortcut(nn.Module):
    """The 1x1 shortcut left by a removed ResNet block that changes the number of channels."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, kernel_size=1)

    def forward(self, hidden: Tensor, _: Tensor) -> Tensor:
        """[B,in_channels,h,w] -> [B,out_channels,h,w]."""
        return self.conv_shortcut(hidden)


def resnet_block(in_channels: int, out_channels: int, *, embedding: int, groups: int) -> ResnetBlock2D:
    """A random ResNet block: [B,in_channels,h,w] and [B,embedding] -> [B,out_channels,h,w]."""
    return ResnetBlock2D(
        in_channels=in_channels,
        out_channels=out_channels,
        temb_channels=embedding,
        groups=groups,
        eps=NORM_EPS,
    )


def attention_block(
    width: int, *, heads: int, context: int, groups: int, linear_projection: bool, upcast_attention: bool
) -> Transformer2DModel:
    """A random cross-attention block: [B,width,h,w] and [B,L,context] -> [B,width,h,w]."""
    return Transformer2DModel(
        heads,
        width // heads,
        in_channels=width,
        num_layers=1,
        cross_attention_dim=context,
        norm_num_groups=groups,
        use_linear_projection=linear_projection,
        upcast_attention=upcast_attention,
    )


class StageModules(nn.Module):
    """The blocks of a stage by key, and its down- or upsampler."""

    def __init__(self, architecture: Architecture, name: str) -> None:
        super().__init__()
        self.layers = architecture.stages[name]
        self.gradient_checkpointing = False
        level = architecture.level(name)
        width = architecture.channels[level]
        sizes = {"embedding": 4 * architecture.channels[0], "groups": architecture.groups}
        self.resnets = nn.ModuleDict()
        self.attentions = nn.ModuleDict()
        for layer, in_channels, out_channels in architecture.layer_channels(name):
            if layer.resnet is not None and layer.whole:
                self.resnets[layer.resnet] = resnet_block(in_channels, out_channels, **sizes)
            elif layer.resnet is not None:
                self.resnets[layer.resnet] = Shortcut(in_channels, out_channels)
            for key in layer.attentions:
                options = architecture.model_dump(include=ATTENTION_FIELDS)
                self.attentions[key] = attention_block(width, heads=architecture.heads[level], **options)
        if name.startswith("down") and level < len(architecture.down) - 1:
            self.downsamplers = nn.ModuleList([Downsample2D(width, use_conv=True, padding=1, name="op")])
        elif name.startswith("up") and level > 0:
            self.upsamplers = nn.ModuleList([Upsample2D(width, use_conv=True)])

    def forward(
        self, hidden: Tensor, time: Tensor, c: Tensor, skips: tuple[Tensor, ...] | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the output of the stage, and its skip connections.

        Args:
            hidden: [B,C,h,w].
            time: the embedded timestep, [B,D].
            c: [B,L,D].
            skips: of an up stage: the skip connections to use, the last one first; None elsewhere.
        """
        outputs: list[Tensor] = []
        unused = list(skips or ())
        for layer in self.layers:
            if layer.skip and skips is not None:
                hidden = torch.cat([hidden, unused.pop()], dim=1)
            if layer.resnet is not None:
                hidden = self._resnet(self.resnets[layer.resnet], hidden, time)
            for key in layer.attentions:
                hidden = self.attentions[key](hidden, encoder_hidden_states=c, return_dict=False)[0]
            if layer.skip and skips is None:
                outputs.append(hidden)
        if hasattr(self, "downsamplers"):
            hidden = self.downsamplers[0](hidden)
            outputs.append(hidden)
        if hasattr(self, "upsamplers"):
            hidden = self.upsamplers[0](hidden)
        return hidden, tuple(outputs)

    def _resnet(self, block: nn.Module, hidden: Tensor, time: Tensor) -> Tensor:
        # Attention is not checkpointed here, because Transformer2DModel checkpoints its own blocks.
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(block, hidden, time)  # type: ignore[operator]
        return block(hidden, time)


class BlockUNet(ModelMixin, ConfigMixin):
    """A UNet of any architecture, with the interface of `UNet2DConditionModel`.

    The last three arguments repeat values of the architecture, because stock pipelines read them from the
    config.

    Args:
        architecture: the values of an `Architecture`.
        sample_size: side of the latent.
        in_channels: of the latent.
        time_cond_proj_dim: size of the guidance embedding of a w-conditioned UNet.
    """

    _supports_gradient_checkpointing = True

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        architecture: dict[str, Any],
        sample_size: int,
        in_channels: int,
        time_cond_proj_dim: int | None = None,
    ) -> None:
        super().__init__()
        layout = Architecture.parse(architecture)
        width = layout.channels[0]
        self.conv_in = nn.Conv2d(layout.in_channels, width, kernel_size=3, padding=1)
        self.time_proj = Timesteps(width, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(width, 4 * width, cond_proj_dim=layout.guidance_embedding)
        self.down_blocks = nn.ModuleList(
            StageModules(layout, f"down_blocks.{level}") for level in range(len(layout.down))
        )
        self.mid_block = StageModules(layout, "mid_block")
        self.up_blocks = nn.ModuleList(
            StageModules(layout, f"up_blocks.{number}") for number in range(len(layout.up))
        )
        self._num_skips = [sum(layer.skip for layer in stage) for stage in layout.up]
        self.conv_norm_out = nn.GroupNorm(layout.groups, width, eps=NORM_EPS)
        self.conv_act = nn.SiLU()
        self.conv_out = nn.Conv2d(width, layout.out_channels, kernel_size=3, padding=1)

    @classmethod
    def of(cls, architecture: Architecture) -> BlockUNet:
        """Build a UNet with random weights."""
        return cls(
            architecture=architecture.to_values(),
            sample_size=architecture.sample_size,
            in_channels=architecture.in_channels,
            time_cond_proj_dim=architecture.guidance_embedding,
        )

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        *,
        timestep_cond: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """Predict eps or v from z_t.

        Args:
            sample: z_t, [B,4,h,w]; h and w are multiples of 2 to the number of downsamplers.
            timestep: [B], or a number for all rows.
            encoder_hidden_states: c, [B,L,D].
            timestep_cond: the guidance embedding, of a w-conditioned UNet.
            return_dict: whether to return an output class or a tuple.
        """
        # Stock pipelines pass a number or a scalar tensor.
        times = torch.as_tensor(timestep, device=sample.device).reshape(-1).expand(sample.shape[0])
        time = self.time_embedding(self.time_proj(times).to(sample.dtype), timestep_cond)
        hidden = self.conv_in(sample)
        skips: tuple[Tensor, ...] = (hidden,)
        for stage in self.down_blocks:
            hidden, outputs = stage(hidden, time, encoder_hidden_states)
            skips += outputs
        hidden, _ = self.mid_block(hidden, time, encoder_hidden_states)
        for stage, num_skips in zip(self.up_blocks, self._num_skips, strict=True):
            rest = len(skips) - num_skips
            hidden, _ = stage(hidden, time, encoder_hidden_states, skips[rest:])
            skips = skips[:rest]
        output = self.conv_out(self.conv_act(self.conv_norm_out(hidden)))
        return UNet2DConditionOutput(sample=output) if return_dict else (output,)


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


def build_unet(architecture: Architecture) -> UNet2DConditionModel | BlockUNet:
    """Build a random UNet: of diffusers' class if that supports the architecture, else a `BlockUNet`."""
    stock = stock_config(architecture)
    return BlockUNet.of(architecture) if stock is None else UNet2DConditionModel(**stock)


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
