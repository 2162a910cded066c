"""Narrow models with the layout of Stable Diffusion 1 and 2, and checkpoints of any tensors."""

from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from snapfusion.models import sd2, sd15
from snapfusion.models.bundle import Bundle
from snapfusion.models.tokenizer import END, clip_tokenizer
from snapfusion.schedule import Schedule


def sd_shaped_bundle(*, version: int = 1, seed: int = 0) -> Bundle:
    """A random model with the layout of SD 1.5 or 2.1 and few channels, for images of 128 pixels."""
    base = sd15 if version == 1 else sd2
    narrow = {"block_out_channels": (32, 32, 64, 64), "cross_attention_dim": 64, "sample_size": 16}
    heads = {} if version == 1 else {"attention_head_dim": (1, 1, 1, 1)}
    text = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Bundle(
            tokenizer=clip_tokenizer(padding=END if version == 1 else sd2.PADDING),
            text_encoder=CLIPTextModel(CLIPTextConfig(**base.TEXT_ENCODER | text | {"projection_dim": 64})),
            unet=UNet2DConditionModel(**base.UNET | narrow | heads),
            vae=AutoencoderKL(**base.VAE | {"block_out_channels": (32, 32, 64, 64), "sample_size": 128}),
            schedule=Schedule(),
            prediction_type="epsilon" if version == 1 else "v_prediction",
            source="test",
        )


def write_checkpoint(
    path: Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None
) -> Path:
    """Write tensors as one safetensors file."""
    contiguous = {key: value.clone().contiguous() for key, value in tensors.items()}
    save_file(contiguous, path, metadata={"format": "pt", **(metadata or {})})
    return path
