"""Stable Diffusion v1.5's architecture as values, and a bundle of that size with random weights.

The random one exercises every full-size path where the real weights are not at hand.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from snapfusion.models.bundle import Bundle
from snapfusion.models.tokenizer import clip_tokenizer
from snapfusion.schedule import Schedule

UNET_PARAMETERS = 859_520_964
"""SnapFusion Table 1 rounds this to 860M."""

UNET: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,  # diffusers' old name: this is the number of heads
    "norm_num_groups": 32,
}

VAE: dict[str, Any] = {
    "sample_size": 512,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
}

TEXT_ENCODER: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "pad_token_id": 49407,
}


def random_bundle(*, seed: int = 0) -> Bundle:
    """SD-v1.5 at full size with random weights: 859,520,964 UNet parameters, about 4.3 GB in float32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Bundle(
            tokenizer=clip_tokenizer(),
            text_encoder=CLIPTextModel(CLIPTextConfig(**TEXT_ENCODER)),
            unet=UNet2DConditionModel(**UNET),
            vae=AutoencoderKL(**VAE),
            schedule=Schedule(),
            prediction_type="epsilon",
            source="random:sd15",
        )
