"""A Bundle as a diffusers folder: safetensors, a scheduler that stock diffusers understands, and a seal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler

from snapfusion.models.bundle import Bundle
from snapfusion.models.checksums import write_checksums
from snapfusion.models.unet import BlockUNet

_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "safety_checker": [None, None],
    "requires_safety_checker": False,
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "vae": ["diffusers", "AutoencoderKL"],
}


DISTILLATION_FILE = "distillation.json"
"""The file that says how a distilled model's steps were distilled, and so how it is to be sampled."""


def save(
    bundle: Bundle,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float16,
    distillation: Mapping[str, Any] | None = None,
) -> None:
    """Write `bundle` to an empty or new `folder`, its weights in `dtype`, and seal it.

    The networks of `bundle` are left in `dtype`: hand over a bundle that is done with.

    Args:
        bundle: the model.
        folder: where.
        dtype: of the weights.
        distillation: for a distilled model, the steps and times it was trained for and the like; JSON values.
    """
    bundle.to("cpu", dtype=dtype)
    for name, network in bundle.networks.items():
        network.save_pretrained(folder / name, safe_serialization=True)
    bundle.tokenizer.save_pretrained(folder / "tokenizer")
    scheduler = DDIMScheduler(
        num_train_timesteps=bundle.schedule.num_steps,
        beta_schedule="scaled_linear",
        beta_start=bundle.schedule.beta_start,
        beta_end=bundle.schedule.beta_end,
        prediction_type=bundle.prediction_type,
        timestep_spacing="trailing",
        steps_offset=1,  # no part of trailing spacing, but diffusers warns of any other value
        set_alpha_to_one=True,
        clip_sample=False,
    )
    scheduler.save_pretrained(folder / "scheduler")
    own = isinstance(bundle.unet, BlockUNet)
    index = {**_INDEX, "unet": [BlockUNet.__module__ if own else "diffusers", type(bundle.unet).__name__]}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    if distillation is not None:
        (folder / DISTILLATION_FILE).write_text(json.dumps(distillation, indent=2, sort_keys=True) + "\n")
    write_checksums(folder)
