"""The parts that a UNet's time is made of, each by all that its time depends on. SnapFusion Sec. 2.2, Fig. 2.

resnet, attention        the blocks of Table 3
shortcut                 what remains of a removed ResNet block that changes the number of channels
join                     a tensor from the way down put beside the one that comes up
downsampler, upsampler   between stages
ends                     the first and last convolution, and what embeds the timestep
"""

from __future__ import annotations

from typing import Literal

import torch
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from pydantic import PositiveInt
from torch import Tensor, nn

from snapfusion.models.architecture import Architecture
from snapfusion.models.unet import NORM_EPS, Shortcut, attention_block, resnet_block
from snapfusion.settings import Settings

PartKind = Literal["resnet", "attention", "shortcut", "join", "downsampler", "upsampler", "ends"]


class Part(Settings):
    """One part.

    Attributes:
        kind: what it computes.
        side: of its input, in pixels of the latent.
        given: channels before it.
        wanted: channels after it.
        heads: of attention; 0 elsewhere.
    """

    kind: PartKind
    side: PositiveInt
    given: PositiveInt
    wanted: PositiveInt
    heads: int = 0

    def __str__(self) -> str:
        return f"{self.kind} of {self.given} to {self.wanted} channels at {self.side}x{self.side}"


class UNetDimensions(Settings):
    """What the parts of a UNet have in common, and their time depends on.

    Attributes:
        batch: latents at once; guided, each is two.
        tokens: of an encoded caption.
        context: its width.
        embedding: width of the embedded timestep.
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
    """The frame of an architecture's parts."""
    return UNetDimensions(
        batch=batch,
        tokens=tokens,
        context=architecture.context,
        embedding=4 * architecture.channels[0],
        groups=architecture.groups,
        latent=architecture.in_channels,
        linear_projection=architecture.linear_projection,
        upcast_attention=architecture.upcast_attention,
    )


def parts_of(architecture: Architecture) -> list[tuple[str, Part]]:
    """The parts in the order of computation, each after the stage that it stands in; "ends" is of its own."""
    outermost = architecture.channels[0]
    side = architecture.sample_size
    parts = [("ends", Part(kind="ends", side=side, given=outermost, wanted=outermost))]
    for stage in architecture.stages:
        parts += [(stage, part) for part in _parts_of_stage(architecture, stage)]
    return parts


def _parts_of_stage(architecture: Architecture, stage: str) -> list[Part]:
    level = architecture.level(stage)
    side, width = architecture.sample_size >> level, architecture.channels[level]
    up, down = stage.startswith("up"), stage.startswith("down")
    parts = []
    for layer, (given, wanted) in zip(architecture.stages[stage], architecture.widths(stage), strict=True):
        if up and layer.skip:
            parts.append(Part(kind="join", side=side, given=given, wanted=given))
        if layer.resnet is not None:
            kind: PartKind = "resnet" if layer.whole else "shortcut"
            parts.append(Part(kind=kind, side=side, given=given, wanted=wanted))
        attention = Part(
            kind="attention", side=side, given=width, wanted=width, heads=architecture.heads[level]
        )
        parts += [attention] * len(layer.attentions)
    if down and level < len(architecture.channels) - 1:
        parts.append(Part(kind="downsampler", side=side, given=width, wanted=width))
    if up and level > 0:
        parts.append(Part(kind="upsampler", side=side, given=width, wanted=width))
    return parts


class Attention(nn.Module):
    """A cross-attention block, asked for its tensor as the UNet asks it: a named output is deprecated."""

    def __init__(self, block: Transformer2DModel) -> None:
        super().__init__()
        self.block = block

    def forward(self, hidden: Tensor, c: Tensor) -> Tensor:
        """[B,C,h,w] and [B,L,D] to [B,C,h,w]."""
        return self.block(hidden, encoder_hidden_states=c, return_dict=False)[0]


class Join(nn.Module):
    """Two tensors side by side."""

    def forward(self, hidden: Tensor, taken: Tensor) -> Tensor:
        """[B,C1,h,w] and [B,C2,h,w] to [B,C1+C2,h,w]."""
        return torch.cat([hidden, taken], dim=1)


class Ends(nn.Module):
    """All of a UNet that is in no stage."""

    def __init__(self, *, width: int, frame: UNetDimensions) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(frame.latent, width, kernel_size=3, padding=1)
        self.time_proj = Timesteps(width, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(width, frame.embedding)
        self.conv_norm_out = nn.GroupNorm(frame.groups, width, eps=NORM_EPS)
        self.conv_act = nn.SiLU()
        self.conv_out = nn.Conv2d(width, frame.latent, kernel_size=3, padding=1)

    def forward(self, z_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The first and the last convolution after one another, and the embedded timestep."""
        time = self.time_embedding(self.time_proj(t).to(z_t.dtype))
        return self.conv_out(self.conv_act(self.conv_norm_out(self.conv_in(z_t)))), time


def module_of(part: Part, *, frame: UNetDimensions) -> nn.Module:
    """The part with random weights, in evaluation mode."""
    module: nn.Module
    if part.kind == "resnet":
        module = resnet_block(part.given, part.wanted, embedding=frame.embedding, groups=frame.groups)
    elif part.kind == "attention":
        module = Attention(
            attention_block(
                part.wanted,
                heads=part.heads,
                context=frame.context,
                groups=frame.groups,
                linear_projection=frame.linear_projection,
                upcast_attention=frame.upcast_attention,
            )
        )
    elif part.kind == "shortcut":
        module = Shortcut(part.given, part.wanted)
    elif part.kind == "join":
        module = Join()
    elif part.kind == "downsampler":
        module = Downsample2D(part.wanted, use_conv=True, padding=1, name="op")
    elif part.kind == "upsampler":
        module = Upsample2D(part.wanted, use_conv=True)
    else:
        module = Ends(width=part.wanted, frame=frame)
    return module.eval().requires_grad_(requires_grad=False)


def inputs_of(part: Part, *, frame: UNetDimensions) -> tuple[Tensor, ...]:
    """Inputs of the part's true shapes, float32 on the CPU."""
    side = (part.side, part.side)
    hidden = torch.randn(frame.batch, part.given, *side)
    if part.kind in ("resnet", "shortcut"):
        return hidden, torch.randn(frame.batch, frame.embedding)
    if part.kind == "attention":
        return hidden, torch.randn(frame.batch, frame.tokens, frame.context)
    if part.kind == "join":
        half = part.given // 2
        return hidden[:, :half].contiguous(), hidden[:, half:].contiguous()
    if part.kind == "ends":
        return torch.randn(frame.batch, frame.latent, *side), torch.full((frame.batch,), 999.0)
    return (hidden,)
