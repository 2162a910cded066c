"""The networks that are compiled for phones, with fixed shapes and named inputs and outputs.

text_encoder   token_ids [1,L] int32 -> c [1,L,D]
unet           z_t [1,4,h,w], t [1], c [1,L,D] -> output [1,4,h,w], which is eps or v
               w-conditioned: the same, with w as a constant
               guided in one call: z_t [1,4,h,w], t [1], c [2,L,D] of "" and the caption -> output [2,4,h,w]
decoder        latent [1,4,h,w], scaled as our tables store it -> image [1,3,H,W] in 0 .. 1

All but token ids are floating point. The decoder's program includes the division by the VAE's scaling factor,
the change of range and the clamp, so that an application needs no constant of ours; likewise the text
encoder's includes the causal mask, and the UNet's the doubling of z_t.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel

from snapfusion.export.attention import set_attention_layout
from snapfusion.export.settings import AttentionLayout
from snapfusion.models.decoder import HalfDecoder
from snapfusion.models.guidance_embedding import guidance_embedding, has_guidance_embedding
from snapfusion.models.snapfusion_unet_v1 import BlockUNet
from snapfusion.models.unet import UNetError

TIMESTEP = "t"
"""Name of the UNet's input."""

MASK_VALUE = -1e4
"""Added to a later token's logit: its softmax is 0 in float16 too, and unlike -inf it can be palettized."""


@dataclass(frozen=True, kw_only=True)
class Port:
    """An input or output of a program.

    Attributes:
        name: of the port.
        shape: which is fixed.
        kind: of its numbers.
        coreml: dtype of floating-point numbers in a Core ML package.
    """

    name: str
    shape: tuple[int, ...]
    kind: Literal["float", "int32"] = "float"
    coreml: Literal["float16", "float32"] = "float16"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of torch's tensors."""
        return torch.int32 if self.kind == "int32" else torch.float32


@dataclass(frozen=True, kw_only=True)
class FixedModule:
    """A network with its ports: source of a compiled program, and the reference for its outputs."""

    name: str
    network: nn.Module
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]

    def example(self) -> tuple[Tensor, ...]:
        """Zeros of the inputs' shapes and kinds, for tracing."""
        return tuple(torch.zeros(port.shape, dtype=port.dtype) for port in self.inputs)

    def trace(self) -> torch.export.ExportedProgram:
        """The network as a graph of ATen operations with these shapes."""
        with torch.no_grad():
            return torch.export.export(self.network, self.example(), strict=False)

    @torch.inference_mode()
    def reference(self, inputs: Sequence[np.ndarray]) -> np.ndarray:
        """The first output that torch computes in float32.

        Raises:
            ValueError: if a shape is not the port's.
        """
        check_shapes(inputs, accepted=[port.shape for port in self.inputs])
        ports = zip(inputs, self.inputs, strict=True)
        return self.network(*(torch.from_numpy(array).to(port.dtype) for array, port in ports)).numpy()


def check_shapes(inputs: Sequence[np.ndarray], *, accepted: Sequence[tuple[int, ...]]) -> None:
    """Check the number and shapes of inputs.

    Raises:
        ValueError: if their number or a shape differs.
    """
    given = [array.shape for array in inputs]
    if given != list(accepted):
        raise ValueError(f"inputs of shapes {given} given; {list(accepted)} is accepted: shapes are fixed")


class TextProgram(nn.Module):
    """Token ids -> the condition c: CLIP's text encoder with the causal mask as a constant."""

    def __init__(self, text_encoder: CLIPTextModel, *, length: int) -> None:
        super().__init__()
        self.embeddings, self.encoder = text_encoder.embeddings, text_encoder.encoder
        self.final_layer_norm = text_encoder.final_layer_norm
        mask = torch.full((length, length), MASK_VALUE).triu(diagonal=1)
        self.register_buffer("mask", mask[None, None], persistent=False)

    def forward(self, token_ids: Tensor) -> Tensor:
        """[1,L] to [1,L,D]."""
        positions = self.embeddings.position_embedding.weight[: token_ids.shape[1]]
        hidden = self.embeddings.token_embedding(token_ids) + positions
        for layer in self.encoder.layers:
            hidden = layer(hidden, attention_mask=self.mask)
        return self.final_layer_norm(hidden)


class UNetProgram(nn.Module):
    """The UNet's prediction for z_t at t, for each condition; at `w` if the UNet takes it as an input."""

    def __init__(self, unet: UNet2DConditionModel | BlockUNet, *, w: float | None = None) -> None:
        super().__init__()
        self.unet = unet
        embedding = None
        if w is not None:
            size = int(unet.config["time_cond_proj_dim"])
            embedding = guidance_embedding(torch.tensor([w]), size=size)
        self.register_buffer("guidance", embedding)

    def forward(self, z_t: Tensor, t: Tensor, c: Tensor) -> Tensor:
        """[1,4,h,w], [1] and [B,L,D] to [B,4,h,w]."""
        each = z_t if c.shape[0] == 1 else torch.cat([z_t] * c.shape[0])
        condition = {} if self.guidance is None else {"timestep_cond": self.guidance}
        return self.unet(each, t, encoder_hidden_states=c, return_dict=False, **condition)[0]


class DecoderProgram(nn.Module):
    """Scaled latent -> image in 0 .. 1, for the half-width or the full decoder."""

    def __init__(self, decoder: HalfDecoder | AutoencoderKL) -> None:
        super().__init__()
        self.decode = decoder if isinstance(decoder, HalfDecoder) else _FullDecoder(decoder)

    def forward(self, latent: Tensor) -> Tensor:
        """[1,4,h,w] -> [1,3,H,W]."""
        return (self.decode(latent) * 0.5 + 0.5).clamp(0.0, 1.0)


class _FullDecoder(nn.Module):
    """The decoding half of an AutoencoderKL, so that the encoder is not compiled with it."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.scaling_factor = float(vae.config["scaling_factor"])
        self.post_quant_conv = vae.post_quant_conv or nn.Identity()
        self.decoder = vae.decoder

    def forward(self, latent: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(latent / self.scaling_factor))


def text_encoder_module(text_encoder: CLIPTextModel, *, length: int) -> FixedModule:
    """The text encoder for captions of `length` tokens."""
    return FixedModule(
        name="text_encoder",
        network=TextProgram(text_encoder, length=length).float().eval(),
        inputs=(Port(name="token_ids", shape=(1, length), kind="int32"),),
        outputs=(Port(name="c", shape=(1, length, text_encoder.config.hidden_size)),),
    )


def unet_module(
    unet: UNet2DConditionModel | BlockUNet,
    *,
    condition_shape: tuple[int, int],
    conditions: Literal[1, 2],
    layout: AttentionLayout = "diffusers",
    w: float | None = None,
) -> FixedModule:
    """The UNet for `conditions` per call, each of `condition_shape` = (L, D).

    Args:
        unet: not modified.
        condition_shape: of c, without its batch.
        conditions: 2 computes both halves of the guidance (Eq. 3) in one call; 1 needs two calls.
        layout: of its attention.
        w: guidance scale of a w-conditioned UNet, a constant of the program; other UNets ignore it.

    Raises:
        UNetError: if the UNet is w-conditioned and no w is given, or more than one condition.
    """
    if not has_guidance_embedding(unet):
        w = None
    elif w is None or conditions != 1:
        raise UNetError("the UNet has a guidance embedding: its program takes one condition, and w is fixed")
    network = arranged_unet(unet, layout=layout)
    size = int(unet.config["sample_size"])
    shape = (1, int(unet.config["in_channels"]), size, size)
    return FixedModule(
        name="unet",
        network=UNetProgram(network, w=w).float().eval(),
        inputs=(
            Port(name="z_t", shape=shape),
            # float16 rounds times that are not whole.
            Port(name=TIMESTEP, shape=(1,), coreml="float32"),
            Port(name="c", shape=(conditions, *condition_shape)),
        ),
        outputs=(Port(name="output", shape=(conditions, *shape[1:])),),
    )


def arranged_unet(unet: UNet2DConditionModel | BlockUNet, *, layout: AttentionLayout) -> nn.Module:
    """A copy of the UNet with that layout of attention and the same weights."""
    network = _copy_sharing_weights(unet)
    set_attention_layout(network, layout=layout)
    return network


def _copy_sharing_weights(network: nn.Module) -> nn.Module:
    """A copy of the modules with the same tensors: a full-size UNet's weights take gigabytes."""
    tensors = [*network.parameters(), *network.buffers()]
    return deepcopy(network, memo={id(tensor): tensor for tensor in tensors})


def decoder_module(
    decoder: HalfDecoder | AutoencoderKL, *, latent_shape: tuple[int, int, int]
) -> FixedModule:
    """The decoder, half-width or full, for latents of `latent_shape` = (4, h, w)."""
    _, height, width = latent_shape
    factor = 2 ** (len(decoder.config.block_out_channels) - 1)
    return FixedModule(
        name="decoder",
        network=DecoderProgram(decoder).float().eval(),
        inputs=(Port(name="latent", shape=(1, *latent_shape)),),
        outputs=(Port(name="image", shape=(1, 3, height * factor, width * factor)),),
    )
