"""Stable Diffusion models of full size with random weights, to run full-size code without the real ones."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from snapfusion.models import sd2, sd15
from snapfusion.models.bundle import Bundle
from snapfusion.models.tokenizer import END, clip_tokenizer
from snapfusion.prediction_types import PredictionType
from snapfusion.schedule import Schedule

RANDOM_PREFIX = "random:"
"""Prefix of the sources of these models, such as "random:sd15"."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Configurations of the networks of a Stable Diffusion, its padding token and prediction type."""

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
    "sd15-v": replace(_SD15, prediction_type="v_prediction"),  # after training by Eq. 6
    "sd2": ModelConfig(
        text_encoder=sd2.TEXT_ENCODER,
        unet=sd2.UNET,
        vae=sd2.VAE,
        padding=sd2.PADDING,
        prediction_type="v_prediction",
    ),
}


def random_bundle(name: str, *, seed: int = 0) -> Bundle:
    """Build a model of `MODEL_CONFIGS` with random weights: 4.3 GB in float32, SD-v2.1 5.2 GB."""
    config = MODEL_CONFIGS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Bundle(
            tokenizer=clip_tokenizer(padding=config.padding),
            text_encoder=CLIPTextModel(CLIPTextConfig(**config.text_encoder)),
            unet=UNet2DConditionModel(**config.unet),
            vae=AutoencoderKL(**config.vae),
            schedule=Schedule(),
            prediction_type=config.prediction_type,
            source=f"{RANDOM_PREFIX}{name}",
        )
