"""Saving a Bundle as a diffusers folder with safetensors, a stock scheduler, a card and checksums."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, LCMScheduler

from snapfusion.models import snapfusion_unet_v1
from snapfusion.models.bundle import Bundle
from snapfusion.models.card import CARD, Provenance, model_card
from snapfusion.models.checksums import write_checksums
from snapfusion.models.distillation_record import DISTILLATION_FILE
from snapfusion.models.snapfusion_unet_v1 import BlockUNet
from snapfusion.models.tokenizer import save_tokenizer
from snapfusion.solver_names import CONSISTENCY

_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "safety_checker": [None, None],
    "requires_safety_checker": False,
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def save(
    bundle: Bundle,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float16,
    distillation: Mapping[str, Any] | None = None,
    provenance: Provenance | None = None,
) -> None:
    """Write `bundle` to an empty or new `folder`, its weights in `dtype`, and add a card and checksums.

    A UNet that no class of diffusers can hold comes with its source, with which stock diffusers opens it.
    The networks of `bundle` are converted to `dtype` in place.

    Args:
        bundle: the model.
        folder: the target folder.
        dtype: of the weights.
        distillation: of a distilled model: its steps, timesteps and the like; JSON values.
        provenance: of a trained model, for its card.
    """
    bundle.to("cpu", dtype=dtype)
    for name, network in (("unet", bundle.unet), ("vae", bundle.vae)):
        network.save_pretrained(folder / name)
        _remove_origin(folder / name / "config.json")
    # transformers 4 finds the tensors under this prefix alone, or leaves the network random; 5 finds both.
    tensors = {f"text_model.{name}": value for name, value in bundle.text_encoder.state_dict().items()}
    bundle.text_encoder.save_pretrained(folder / "text_encoder", state_dict=tensors)
    save_tokenizer(bundle.tokenizer, folder / "tokenizer")
    scheduler = _scheduler(bundle, distillation or {})
    scheduler.save_pretrained(folder / "scheduler")
    unet = ["diffusers", type(bundle.unet).__name__]
    if isinstance(bundle.unet, BlockUNet):
        # diffusers executes a module of this name in the network's folder, given trust_remote_code=True.
        module = Path(snapfusion_unet_v1.__file__)
        shutil.copyfile(module, folder / "unet" / module.name)
        unet[0] = module.stem
    index = {**_INDEX, "scheduler": ["diffusers", type(scheduler).__name__], "unet": unet}
    _write_json(folder / "model_index.json", index)
    if distillation is not None:
        _write_json(folder / DISTILLATION_FILE, distillation)
    card = model_card(replace(bundle, distillation=distillation), provenance=provenance)
    (folder / CARD).write_text(card, encoding="utf-8")
    write_checksums(folder)


def _scheduler(bundle: Bundle, distillation: Mapping[str, Any]) -> DDIMScheduler | LCMScheduler:
    """The stock scheduler with which diffusers samples a model as this package does."""
    shared = {
        "num_train_timesteps": bundle.schedule.num_steps,
        "beta_schedule": "scaled_linear",
        "beta_start": bundle.schedule.beta_start,
        "beta_end": bundle.schedule.beta_end,
        "prediction_type": bundle.prediction_type,
        "set_alpha_to_one": True,
        "clip_sample": False,
        "steps_offset": 1,  # unused with these grids, but diffusers warns of any other value
    }
    if distillation.get("sampler") == CONSISTENCY:
        points, steps = distillation["points"], distillation["steps"]
        # Its grid of so many points is ours where they divide the schedule; else that of the steps alone is.
        divides = bundle.schedule.num_steps % points == 0
        return LCMScheduler(**shared, original_inference_steps=points if divides else steps)
    return DDIMScheduler(**shared, timestep_spacing="trailing")  # the time grid of distillation


def _remove_origin(config: Path) -> None:
    """Remove where diffusers read the network from: a path of this machine, and no part of the model."""
    values = json.loads(config.read_text(encoding="utf-8"))
    values.pop("_name_or_path", None)
    config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
