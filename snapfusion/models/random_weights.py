"""Stable Diffusions at full size with random weights.

They exercise every full-size path where the real weights are not at hand.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from snapfusion.models import sd2, sd15
from snapfusion.models.bundle import Bundle
from snapfusion.models.tokenizer import END, clip_tokenizer
from snapfusion.schedule import PredictionType, Schedule

RANDOM_PREFIX = "random:"
"""Begins their sources."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What a Stable Diffusion consists of: the configurations of its networks, and the rest."""

    text_encoder: dict[str, Any]
    unet: dict[str, Any]
    vae: dict[str, Any]
    padding: str
    prediction_type: PredictionType


_SD15 = ModelConfig(
    text_encoder=sd15.TEXT_ENCODER,
    unet=sd15.UNET,
    vae=sd15.VAE,
    padding=END,
    prediction_type="epsilon",
)
MODEL_CONFIGS = {
    "sd15": _SD15,
    "sd15-v": replace(_SD15, prediction_type="v_prediction"),  # as Eq. 6 leaves it
    "sd2": ModelConfig(
        text_encoder=sd2.TEXT_ENCODER,
        unet=sd2.UNET,
        vae=sd2.VAE,
        padding=sd2.PADDING,
        prediction_type="v_prediction",
    ),
}


def random_bundle(name: str, *, seed: int = 0) -> Bundle:
    """The architecture of that name with random weights: about 4.3 GB in float32, for SD-v2.1 5.2 GB."""
    architecture = MODEL_CONFIGS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Bundle(
            tokenizer=clip_tokenizer(padding=architecture.padding),
            text_encoder=CLIPTextModel(CLIPTextConfig(**architecture.text_encoder)),
            unet=UNet2DConditionModel(**architecture.unet),
            vae=AutoencoderKL(**architecture.vae),
            schedule=Schedule(),
            prediction_type=architecture.prediction_type,
            source=f"{RANDOM_PREFIX}{name}",
        )
