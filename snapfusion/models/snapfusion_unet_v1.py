"""The UNet of SnapFusion's students: diffusers' blocks in any arrangement. SnapFusion Sec. 3.1, Table 3.

A saved model contains a copy of this file, with which stock diffusers (0.36 and later) opens it. So it
imports torch and diffusers only. diffusers caches such files by name: a change that older models cannot be
opened with, or newer ones need, is made under the name of the next version.

Tensor names are those of `UNet2DConditionModel`, so weights are interchangeable for blocks that both have.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from diffusers.models.upsampling import Upsample2D
from diffusers.utils import USE_PEFT_BACKEND, scale_lora_layers, unscale_lora_layers
from torch import Tensor, nn

NORM_EPS = 1e-5

ATTENTION_FIELDS = {"context", "groups", "linear_projection", "upcast_attention"}
"""Values of an architecture that all its cross-attention blocks share."""


def stage_level(stage: str, *, levels: int) -> int:
    """Return the number of halvings of the latent before a stage: down_blocks.N, mid_block or up_blocks.N."""
    side, _, number = stage.partition(".")
    deepest = levels - 1
    if side == "mid_block":
        return deepest
    return int(number) if side == "down_blocks" else deepest - int(number)


def layer_channels(stage: str, *, channels: Sequence[int], skips: Sequence[bool]) -> list[tuple[int, int]]:
    """Return the channels before and after the ResNet block of each layer of a stage.

    Those before include the channels of a concatenated skip connection.

    Args:
        stage: its name.
        channels: of each level of the UNet, the outermost first.
        skips: of each layer: whether it has a skip connection.
    """
    side, level = stage.partition("_")[0], stage_level(stage, levels=len(channels))
    out_channels = channels[level]
    outer = channels[max(level - 1, 0)]
    deeper = channels[min(level + 1, len(channels) - 1)]
    in_channels = {"down": outer, "up": deeper}.get(side, out_channels)
    # Skip connections are used in reverse: those of the level's own layers first, its input last.
    rest = [out_channels] * (sum(skips) - 1) + [outer]
    found = []
    for skip in skips:
        extra = rest.pop(0) if side == "up" and skip else 0
        found.append((in_channels + extra, out_channels))
        in_channels = out_channels
    return found


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

    def __init__(
        self, name: str, layers: Sequence[Mapping[str, Any]], *, architecture: Mapping[str, Any]
    ) -> None:
        super().__init__()
        self.layers = layers
        self.gradient_checkpointing = False
        channels = architecture["channels"]
        level = stage_level(name, levels=len(channels))
        width, heads = channels[level], architecture["heads"][level]
        sizes = {"embedding": 4 * channels[0], "groups": architecture["groups"]}
        options = {field: architecture[field] for field in ATTENTION_FIELDS}
        self.resnets = nn.ModuleDict()
        self.attentions = nn.ModuleDict()
        pairs = layer_channels(name, channels=channels, skips=[layer["skip"] for layer in layers])
        for layer, (in_channels, out_channels) in zip(layers, pairs, strict=True):
            key = layer["resnet"]
            if key is not None and layer["whole"]:
                self.resnets[key] = resnet_block(in_channels, out_channels, **sizes)
            elif key is not None:
                self.resnets[key] = Shortcut(in_channels, out_channels)
            for key in layer["attentions"]:
                self.attentions[key] = attention_block(width, heads=heads, **options)
        if name.startswith("down") and level < len(channels) - 1:
            self.downsamplers = nn.ModuleList([Downsample2D(width, use_conv=True, padding=1, name="op")])
        elif name.startswith("up") and level > 0:
            self.upsamplers = nn.ModuleList([Upsample2D(width, use_conv=True)])

    def forward(
        self,
        hidden: Tensor,
        time: Tensor,
        c: Tensor,
        skips: tuple[Tensor, ...] | None = None,
        *,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the output of the stage, and its skip connections.

        Args:
            hidden: [B,C,h,w].
            time: the embedded timestep, [B,D].
            c: [B,L,D].
            skips: of an up stage: the skip connections to use, the last one first; None elsewhere.
            attention_kwargs: of the attention processors.
        """
        outputs: list[Tensor] = []
        unused = list(skips or ())
        for layer in self.layers:
            if layer["skip"] and skips is not None:
                hidden = torch.cat([hidden, unused.pop()], dim=1)
            if layer["resnet"] is not None:
                hidden = self._resnet(self.resnets[layer["resnet"]], hidden, time)
            for key in layer["attentions"]:
                inputs = {"encoder_hidden_states": c, "cross_attention_kwargs": attention_kwargs}
                hidden = self.attentions[key](hidden, **inputs, return_dict=False)[0]
            if layer["skip"] and skips is None:
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


class BlockUNet(ModelMixin, AttentionMixin, ConfigMixin, PeftAdapterMixin):
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
        channels, down, up = (architecture[name] for name in ("channels", "down", "up"))
        width = channels[0]
        embedding = {"cond_proj_dim": architecture["guidance_embedding"]}
        self.conv_in = nn.Conv2d(in_channels, width, kernel_size=3, padding=1)
        self.time_proj = Timesteps(width, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(width, 4 * width, **embedding)
        self.down_blocks = nn.ModuleList(
            StageModules(f"down_blocks.{level}", layers, architecture=architecture)
            for level, layers in enumerate(down)
        )
        self.mid_block = StageModules("mid_block", architecture["middle"], architecture=architecture)
        self.up_blocks = nn.ModuleList(
            StageModules(f"up_blocks.{number}", layers, architecture=architecture)
            for number, layers in enumerate(up)
        )
        self._num_skips = [sum(layer["skip"] for layer in layers) for layers in up]
        self.conv_norm_out = nn.GroupNorm(architecture["groups"], width, eps=NORM_EPS)
        self.conv_act = nn.SiLU()
        self.conv_out = nn.Conv2d(width, architecture["out_channels"], kernel_size=3, padding=1)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        *,
        timestep_cond: Tensor | None = None,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        added_cond_kwargs: Mapping[str, Any] | None = None,
        return_dict: bool = True,
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """Predict eps or v from z_t.

        These are the arguments that diffusers' pipelines for text give `UNet2DConditionModel`.

        Args:
            sample: z_t, [B,4,h,w]; h and w are multiples of 2 to the number of downsamplers.
            timestep: [B], or a number for all rows.
            encoder_hidden_states: c, [B,L,D].
            timestep_cond: the guidance embedding, of a w-conditioned UNet.
            cross_attention_kwargs: "scale" multiplies loaded LoRAs; the rest is for the attention processors.
            added_cond_kwargs: not used, as by a stock UNet without additional embeddings.
            return_dict: whether to return an output class or a tuple.
        """
        attention_kwargs = dict(cross_attention_kwargs or {})
        scale = attention_kwargs.pop("scale", 1.0)
        scales_loras = USE_PEFT_BACKEND and scale != 1.0
        if scales_loras:
            scale_lora_layers(self, scale)
        try:
            output = self._predict(sample, timestep, encoder_hidden_states, timestep_cond, attention_kwargs)
        finally:
            if scales_loras:
                unscale_lora_layers(self, scale)
        return UNet2DConditionOutput(sample=output) if return_dict else (output,)

    def _predict(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        c: Tensor,
        timestep_cond: Tensor | None,
        attention_kwargs: dict[str, Any],
    ) -> Tensor:
        # Stock pipelines pass a number or a scalar tensor.
        times = torch.as_tensor(timestep, device=sample.device).reshape(-1).expand(sample.shape[0])
        time = self.time_embedding(self.time_proj(times).to(sample.dtype), timestep_cond)
        hidden, options = self.conv_in(sample), {"attention_kwargs": attention_kwargs}
        skips: tuple[Tensor, ...] = (hidden,)
        for stage in self.down_blocks:
            hidden, outputs = stage(hidden, time, c, **options)
            skips += outputs
        hidden, _ = self.mid_block(hidden, time, c, **options)
        for stage, num_skips in zip(self.up_blocks, self._num_skips, strict=True):
            rest = len(skips) - num_skips
            hidden, _ = stage(hidden, time, c, skips[rest:], **options)
            skips = skips[:rest]
        return self.conv_out(self.conv_act(self.conv_norm_out(hidden)))
