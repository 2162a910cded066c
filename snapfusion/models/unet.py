"""A UNet built from its architecture: diffusers' blocks in any arrangement. SnapFusion Sec. 3.1, Table 3.

Tensors have the names that they have in `UNet2DConditionModel`, so the weights of a block that is in both fit
both.
"""

from __future__ import annotations

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

from snapfusion.models.architecture import Architecture, Layer, StageLayers, origin_of

NORM_EPS = 1e-5

# What diffusers' class must be told for `architecture_of` to say all of it.
_REQUIRED_CONFIG = {
    "act_fn": "silu",
    "addition_embed_type": None,
    "center_input_sample": False,
    "class_embed_type": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "downsample_padding": 1,
    "dropout": 0.0,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": NORM_EPS,
    "num_attention_heads": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "transformer_layers_per_block": 1,
}
_DOWN = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
_UP = {"CrossAttnUpBlock2D": True, "UpBlock2D": False}


class UNetError(ValueError):
    """A UNet of a kind that has no architecture here, or weights that do not fit one; says what and where."""


class Shortcut(nn.Module):
    """What remains of a ResNet block that changes the number of channels, once its residual is zero."""

    def __init__(self, given: int, wanted: int) -> None:
        super().__init__()
        self.conv_shortcut = nn.Conv2d(given, wanted, kernel_size=1)

    def forward(self, hidden: Tensor, _: Tensor) -> Tensor:
        """[B,given,h,w] to [B,wanted,h,w]."""
        return self.conv_shortcut(hidden)


def resnet_block(given: int, wanted: int, *, embedding: int, groups: int) -> ResnetBlock2D:
    """A ResNet block, with random weights: [B,given,h,w] and [B,embedding] to [B,wanted,h,w]."""
    return ResnetBlock2D(
        in_channels=given, out_channels=wanted, temb_channels=embedding, groups=groups, eps=NORM_EPS
    )


def attention_block(
    width: int, *, heads: int, context: int, groups: int, linear_projection: bool, upcast_attention: bool
) -> Transformer2DModel:
    """A cross-attention block, with random weights: [B,width,h,w] and [B,L,context] to [B,width,h,w]."""
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
    """A stage's blocks by key, and its sampler, in the order that its layers say."""

    def __init__(self, shape: Architecture, name: str) -> None:
        super().__init__()
        self.layers = shape.stages[name]
        self.gradient_checkpointing = False
        level = shape.level(name)
        width = shape.channels[level]
        self.resnets = nn.ModuleDict()
        self.attentions = nn.ModuleDict()
        for layer, (given, wanted) in zip(self.layers, shape.widths(name), strict=True):
            if layer.resnet is not None:
                self.resnets[layer.resnet] = (
                    resnet_block(given, wanted, embedding=4 * shape.channels[0], groups=shape.groups)
                    if layer.whole
                    else Shortcut(given, wanted)
                )
            for key in layer.attentions:
                self.attentions[key] = attention_block(
                    width,
                    heads=shape.heads[level],
                    context=shape.context,
                    groups=shape.groups,
                    linear_projection=shape.linear_projection,
                    upcast_attention=shape.upcast_attention,
                )
        if name.startswith("down") and level < len(shape.down) - 1:
            self.downsamplers = nn.ModuleList([Downsample2D(width, use_conv=True, padding=1, name="op")])
        elif name.startswith("up") and level > 0:
            self.upsamplers = nn.ModuleList([Upsample2D(width, use_conv=True)])

    def forward(
        self, hidden: Tensor, time: Tensor, c: Tensor, taken: tuple[Tensor, ...] | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """What it makes of `hidden`, and what it hands over.

        Args:
            hidden: [B,C,h,w].
            time: the embedded timestep, [B,D].
            c: [B,L,D].
            taken: on the way up, what was handed over, the last first to be used; None elsewhere.
        """
        given: list[Tensor] = []
        waiting = list(taken or ())
        for layer in self.layers:
            if layer.skip and taken is not None:
                hidden = torch.cat([hidden, waiting.pop()], dim=1)
            if layer.resnet is not None:
                hidden = self._resnet(self.resnets[layer.resnet], hidden, time)
            for key in layer.attentions:
                hidden = self.attentions[key](hidden, encoder_hidden_states=c, return_dict=False)[0]
            if layer.skip and taken is None:
                given.append(hidden)
        if hasattr(self, "downsamplers"):
            hidden = self.downsamplers[0](hidden)
            given.append(hidden)
        if hasattr(self, "upsamplers"):
            hidden = self.upsamplers[0](hidden)
        return hidden, tuple(given)

    def _resnet(self, block: nn.Module, hidden: Tensor, time: Tensor) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(block, hidden, time)  # type: ignore[operator]
        return block(hidden, time)


class BlockUNet(ModelMixin, ConfigMixin):
    """A UNet by its architecture; what goes in and comes out is as in `UNet2DConditionModel`.

    Args:
        architecture: the values of an `Architecture`.
        sample_size: side of the latent, which the architecture says too: stock pipelines look for it here.
        in_channels: of the latent, likewise.
        time_cond_proj_dim: numbers in which w is told, likewise.
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
        shape = Architecture.parse(architecture)
        outermost = shape.channels[0]
        self.conv_in = nn.Conv2d(shape.in_channels, outermost, kernel_size=3, padding=1)
        self.time_proj = Timesteps(outermost, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(
            outermost, 4 * outermost, cond_proj_dim=shape.guidance_embedding
        )
        self.down_blocks = nn.ModuleList(
            StageModules(shape, f"down_blocks.{level}") for level in range(len(shape.down))
        )
        self.mid_block = StageModules(shape, "mid_block")
        self.up_blocks = nn.ModuleList(
            StageModules(shape, f"up_blocks.{number}") for number in range(len(shape.up))
        )
        self._taken = [sum(layer.skip for layer in stage) for stage in shape.up]
        self.conv_norm_out = nn.GroupNorm(shape.groups, outermost, eps=NORM_EPS)
        self.conv_act = nn.SiLU()
        self.conv_out = nn.Conv2d(outermost, shape.out_channels, kernel_size=3, padding=1)

    @classmethod
    def of(cls, architecture: Architecture) -> BlockUNet:
        """With random weights."""
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
        """What the network predicts of z_t.

        Args:
            sample: z_t, [B,4,h,w]; h and w are multiples of 2 to the number of halvings.
            timestep: [B], or one number for all.
            encoder_hidden_states: c, [B,L,D].
            timestep_cond: the embedded guidance scale, where the network is told it.
            return_dict: whether the output is named.
        """
        times = torch.as_tensor(timestep, device=sample.device).reshape(-1).expand(sample.shape[0])
        time = self.time_embedding(self.time_proj(times).to(sample.dtype), timestep_cond)
        hidden = self.conv_in(sample)
        handed: tuple[Tensor, ...] = (hidden,)
        for stage in self.down_blocks:
            hidden, given = stage(hidden, time, encoder_hidden_states)
            handed += given
        hidden, _ = self.mid_block(hidden, time, encoder_hidden_states)
        for stage, count in zip(self.up_blocks, self._taken, strict=True):
            kept = len(handed) - count
            hidden, _ = stage(hidden, time, encoder_hidden_states, handed[kept:])
            handed = handed[:kept]
        output = self.conv_out(self.conv_act(self.conv_norm_out(hidden)))
        return UNet2DConditionOutput(sample=output) if return_dict else (output,)


def architecture_of(unet: UNet2DConditionModel | BlockUNet) -> Architecture:
    """The architecture of a UNet of either class.

    Raises:
        UNetError: if it has anything that Stable Diffusion v1 and v2 have not; names it.
    """
    config = unet.config
    if isinstance(unet, BlockUNet):
        return Architecture.parse(config["architecture"])
    for name, value in _REQUIRED_CONFIG.items():
        if config[name] != value:
            raise UNetError(f"the UNet has {name} = {config[name]!r}; {value!r} is accepted")
    for name, known in (("down_block_types", _DOWN), ("up_block_types", _UP)):
        if unknown := [kind for kind in config[name] if kind not in known]:
            raise UNetError(f"the UNet has a stage {unknown[0]}; {', '.join(known)} are accepted")
    levels = len(config["block_out_channels"])
    heads, layers = config["attention_head_dim"], config["layers_per_block"]
    layers = [layers] * levels if isinstance(layers, int) else list(layers)
    return Architecture(
        channels=tuple(config["block_out_channels"]),
        heads=(heads,) * levels if isinstance(heads, int) else tuple(heads),
        down=tuple(
            _stock_stage(count, attention=_DOWN[kind])
            for kind, count in zip(config["down_block_types"], layers, strict=True)
        ),
        middle=(Layer(resnet="0", attentions=("0",)), Layer(resnet="1")),
        up=tuple(
            _stock_stage(count + 1, attention=_UP[kind])
            for kind, count in zip(config["up_block_types"], reversed(layers), strict=True)
        ),
        context=config["cross_attention_dim"],
        groups=config["norm_num_groups"],
        sample_size=config["sample_size"],
        in_channels=config["in_channels"],
        out_channels=config["out_channels"],
        linear_projection=config["use_linear_projection"],
        upcast_attention=config["upcast_attention"],
        guidance_embedding=config["time_cond_proj_dim"],
    )


def resize_unet(unet: UNet2DConditionModel | BlockUNet, *, side: int) -> None:
    """Let a UNet say that its latents have another side. No weight depends on it."""
    told: dict[str, Any] = {"sample_size": side}
    if isinstance(unet, BlockUNet):
        told["architecture"] = {**unet.config["architecture"], "sample_size": side}
    unet.register_to_config(**told)


def _stock_stage(count: int, *, attention: bool) -> StageLayers:
    return tuple(
        Layer(resnet=str(number), attentions=(str(number),) if attention else (), skip=True)
        for number in range(count)
    )


def build_unet(architecture: Architecture) -> UNet2DConditionModel | BlockUNet:
    """A UNet with random weights: of the stock class where that can hold it, else a `BlockUNet`."""
    stock = stock_config(architecture)
    return BlockUNet.of(architecture) if stock is None else UNet2DConditionModel(**stock)


def stock_config(architecture: Architecture) -> dict[str, Any] | None:
    """What `UNet2DConditionModel` is to be told for this architecture, or None if it cannot hold it."""
    layers = [len(stage) for stage in architecture.down]
    attentive = [any(layer.attentions for layer in stage) for stage in architecture.down]
    config = {
        "sample_size": architecture.sample_size,
        "in_channels": architecture.in_channels,
        "out_channels": architecture.out_channels,
        "block_out_channels": architecture.channels,
        "layers_per_block": tuple(layers),
        "down_block_types": tuple("CrossAttnDownBlock2D" if any_ else "DownBlock2D" for any_ in attentive),
        "up_block_types": tuple(
            "CrossAttnUpBlock2D" if any_ else "UpBlock2D" for any_ in reversed(attentive)
        ),
        "cross_attention_dim": architecture.context,
        "attention_head_dim": architecture.heads,
        "norm_num_groups": architecture.groups,
        "use_linear_projection": architecture.linear_projection,
        "upcast_attention": architecture.upcast_attention,
        "time_cond_proj_dim": architecture.guidance_embedding,
    }
    held = {
        "down": tuple(
            _stock_stage(count, attention=any_) for count, any_ in zip(layers, attentive, strict=True)
        ),
        "middle": (Layer(resnet="0", attentions=("0",)), Layer(resnet="1")),
        "up": tuple(
            _stock_stage(count + 1, attention=any_)
            for count, any_ in zip(reversed(layers), reversed(attentive), strict=True)
        ),
    }
    asked = {name: getattr(architecture, name) for name in held}
    return config if held == asked else None


def inherit_weights(unet: nn.Module, source: nn.Module) -> list[str]:
    """Give each block of `unet` its weights in `source`, or those of the block that it is a copy of.

    Returns:
        The names of blocks that had to be copied from their origin, because `source` has them not.

    Raises:
        UNetError: if `source` lacks a tensor or has it in another shape; says which.
    """
    there, copied, given = source.state_dict(), set(), {}
    for name, tensor in unet.state_dict().items():
        found = name if name in there else _name_in_origin(name)
        if found not in there:
            raise UNetError(f"the weights do not fit: there is no {found}")
        if there[found].shape != tensor.shape:
            raise UNetError(
                f"the weights do not fit: {found} is {tuple(there[found].shape)} there, "
                f"{tuple(tensor.shape)} here"
            )
        if found != name:
            block, _, rest = name.partition("+")
            copied.add(f"{block}+{rest.partition('.')[0]}")
        given[name] = there[found]
    unet.load_state_dict(given)
    return sorted(copied)


def _name_in_origin(name: str) -> str:
    return ".".join(origin_of(part) if "+" in part else part for part in name.split("."))
