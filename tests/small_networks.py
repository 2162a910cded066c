"""Small modules of the three kinds that are compiled for phones, and inputs for them."""

from typing import TypeVar

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from snapfusion.export.modules import FixedModule, decoder_module, text_encoder_module, unet_module
from snapfusion.export.settings import AttentionLayout
from snapfusion.models.decoder import HalfDecoder

LATENT = (4, 8, 8)
SCALING = 0.4
LENGTH, WIDTH = 6, 16
"""Tokens of a caption, and width of its encoding."""

Network = TypeVar("Network", bound=nn.Module)


def small_vae(seed: int = 0) -> AutoencoderKL:
    """A VAE of two levels with one layer each, with attention in the middle."""
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        scaling_factor=SCALING,
        sample_size=16,
    )
    return _perturbed(vae)


def small_decoder() -> FixedModule:
    """The half-width decoder of the small VAE."""
    return decoder_module(HalfDecoder.from_vae(small_vae()), latent_shape=LATENT)


def small_unet(*, layout: AttentionLayout = "channels-first") -> FixedModule:
    """A UNet of two levels; one of them and the middle have cross-attention with two heads."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=LATENT[1],
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
    )
    return unet_module(_perturbed(unet), condition_shape=(LENGTH, WIDTH), conditions=2, layout=layout)


def small_text_encoder(*, vocabulary: int = 50) -> FixedModule:
    """A text encoder of two layers with two heads."""
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        bos_token_id=0,
        eos_token_id=1,
    )
    return text_encoder_module(_perturbed(CLIPTextModel(config)), length=LENGTH)


def inputs_of(module: FixedModule, *, seed: int = 0) -> list[np.ndarray]:
    """Normal numbers; token ids below 50; a time that float16 rounds."""
    random = np.random.default_rng(seed)
    inputs = []
    for port in module.inputs:
        if port.kind == "int32":
            inputs.append(random.integers(50, size=port.shape, dtype=np.int32))
        elif port.name == "t":
            inputs.append(np.array([998.75], np.float32))
        else:
            inputs.append(random.standard_normal(port.shape, dtype=np.float32))
    return inputs


def _perturbed(network: Network) -> Network:
    # Fresh networks have unit GroupNorms and zero biases, which a converter may fold away.
    for parameter in network.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return network.eval()
