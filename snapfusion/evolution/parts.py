"""The parts of a UNet that are timed separately, with all that their latency depends on. Sec. 2.2, Fig. 2.

resnet, attention        the blocks of Table 3
shortcut                 what a removed ResNet block leaves if it changes the number of channels
join                     the concatenation of a skip connection
downsampler, upsampler   between stages
ends                     the first and last convolution and the timestep embedding
"""

from typing import Literal

import torch
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from pydantic import ConfigDict, Field, PositiveInt
from torch import Tensor, nn

from snapfusion.models.architecture import Architecture
from snapfusion.models.snapfusion_unet_v1 import (
    ATTENTION_FIELDS,
    NORM_EPS,
    Shortcut,
    attention_block,
    resnet_block,
)
from snapfusion.settings import Settings

PartKind = Literal["resnet", "attention", "shortcut", "join", "downsampler", "upsampler", "ends"]


class Part(Settings):
    """A part of a UNet.

    Attributes:
        kind: of its computation.
        side: of its input, in pixels of the latent.
        in_channels: of its input ("given" in a latency file).
        out_channels: of its output ("wanted" in a latency file).
        heads: of attention; 0 for other kinds.
    """

    model_config = ConfigDict(validate_by_name=True, serialize_by_alias=True)

    kind: PartKind
    side: PositiveInt
    in_channels: PositiveInt = Field(alias="given")
    out_channels: PositiveInt = Field(alias="wanted")
    heads: int = 0

    def __str__(self) -> str:
        return f"{self.kind} of {self.in_channels} to {self.out_channels} channels at {self.side}x{self.side}"


class UNetDimensions(Settings):
    """Dimensions that all parts of a UNet share, and on which their latency depends.

    Attributes:
        batch: latents per pass; guidance takes two for each image.
        tokens: of an encoded caption.
        context: width of an encoded caption.
        embedding: width of the timestep embedding.
        groups: of the norms.
        latent: channels of the latent.
        linear_projection: see `Architecture`.
        upcast_attention: see `Architecture`.
    """

    batch: PositiveInt
    tokens: PositiveInt
    context: PositiveInt
    embedding: PositiveInt
    groups: PositiveInt
    latent: PositiveInt
    linear_projection: bool
    upcast_attention: bool


def dimensions_of(architecture: Architecture, *, batch: int, tokens: int) -> UNetDimensions:
    """Return the shared dimensions of an architecture's parts."""
    return UNetDimensions(
        batch=batch,
        tokens=tokens,
        embedding=4 * architecture.channels[0],
        latent=architecture.in_channels,
        **architecture.model_dump(include=ATTENTION_FIELDS),
    )


def parts_of(architecture: Architecture) -> list[tuple[str, Part]]:
    """List (stage, part) in the order of computation; "ends" is a stage of its own."""
    width, side = architecture.channels[0], architecture.sample_size
    parts = [("ends", Part(kind="ends", side=side, in_channels=width, out_channels=width))]
    for stage in architecture.stages:
        parts += [(stage, part) for part in _parts_of_stage(architecture, stage)]
    return parts


def _parts_of_stage(architecture: Architecture, stage: str) -> list[Part]:
    level = architecture.level(stage)
    width = architecture.channels[level]
    up, down = stage.startswith("up"), stage.startswith("down")

    def part(kind: PartKind, in_channels: int = width, out_channels: int = width, *, heads: int = 0) -> Part:
        side = architecture.sample_size >> level
        return Part(kind=kind, side=side, in_channels=in_channels, out_channels=out_channels, heads=heads)

    parts = []
    for layer, in_channels, out_channels in architecture.layer_channels(stage):
        if up and layer.skip:
            parts.append(part("join", in_channels, in_channels))
        if layer.resnet is not None:
            parts.append(part("resnet" if layer.whole else "shortcut", in_channels, out_channels))
        parts += [part("attention", heads=architecture.heads[level])] * len(layer.attentions)
    if down and level < len(architecture.channels) - 1:
        parts.append(part("downsampler"))
    if up and level > 0:
        parts.append(part("upsampler"))
    return parts


class Attention(nn.Module):
    """A cross-attention block, called as in the UNet: diffusers deprecates its named output."""

    def __init__(self, block: Transformer2DModel) -> None:
        super().__init__()
        self.block = block

    def forward(self, hidden: Tensor, c: Tensor) -> Tensor:
        """[B,C,h,w] and [B,L,D] -> [B,C,h,w]."""
        return self.block(hidden, encoder_hidden_states=c, return_dict=False)[0]


class Join(nn.Module):
    """Concatenation of a skip connection."""

    def forward(self, hidden: Tensor, skip: Tensor) -> Tensor:
        """[B,C1,h,w] and [B,C2,h,w] -> [B,C1+C2,h,w]."""
        return torch.cat([hidden, skip], dim=1)


class Ends(nn.Module):
    """The layers of a UNet outside of its stages."""

    def __init__(self, *, width: int, dimensions: UNetDimensions) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(dimensions.latent, width, kernel_size=3, padding=1)
        self.time_proj = Timesteps(width, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(width, dimensions.embedding)
        self.conv_norm_out = nn.GroupNorm(dimensions.groups, width, eps=NORM_EPS)
        self.conv_act = nn.SiLU()
        self.conv_out = nn.Conv2d(width, dimensions.latent, kernel_size=3, padding=1)

    def forward(self, z_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Apply the first and the last convolution to z_t, and embed the timestep."""
        time = self.time_embedding(self.time_proj(t).to(z_t.dtype))
        return self.conv_out(self.conv_act(self.conv_norm_out(self.conv_in(z_t)))), time


def module_of(part: Part, *, dimensions: UNetDimensions) -> nn.Module:
    """Build the part with random weights, in evaluation mode."""
    module: nn.Module
    if part.kind == "resnet":
        module = resnet_block(
            part.in_channels, part.out_channels, embedding=dimensions.embedding, groups=dimensions.groups
        )
    elif part.kind == "attention":
        options = dimensions.model_dump(include=ATTENTION_FIELDS)
        module = Attention(attention_block(part.out_channels, heads=part.heads, **options))
    elif part.kind == "shortcut":
        module = Shortcut(part.in_channels, part.out_channels)
    elif part.kind == "join":
        module = Join()
    elif part.kind == "downsampler":
        module = Downsample2D(part.out_channels, use_conv=True, padding=1, name="op")
    elif part.kind == "upsampler":
        module = Upsample2D(part.out_channels, use_conv=True)
    else:
        module = Ends(width=part.out_channels, dimensions=dimensions)
    return module.eval().requires_grad_(requires_grad=False)


def inputs_of(part: Part, *, dimensions: UNetDimensions) -> tuple[Tensor, ...]:
    """Make inputs of the part's true shapes, float32 on the CPU."""
    batch, side = dimensions.batch, (part.side, part.side)
    hidden = torch.randn(batch, part.in_channels, *side)
    if part.kind in ("resnet", "shortcut"):
        return hidden, torch.randn(batch, dimensions.embedding)
    if part.kind == "attention":
        return hidden, torch.randn(batch, dimensions.tokens, dimensions.context)
    if part.kind == "join":
        half = part.in_channels // 2
        return hidden[:, :half].contiguous(), hidden[:, half:].contiguous()
    if part.kind == "ends":
        return torch.randn(batch, dimensions.latent, *side), torch.full((batch,), 999.0)
    return (hidden,)
