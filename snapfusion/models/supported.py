"""Recognizing models that are not text-to-image models of Stable Diffusion 1 or 2."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from snapfusion.models.errors import ModelError

_ACCEPTED = "give a text-to-image model of Stable Diffusion 1 or 2"
_CHANNELS = {8: "an image-editing model (InstructPix2Pix)", 9: "an inpainting model"}
_COMPONENTS = {
    "transformer": "a diffusion transformer (SD3, Flux or the like)",
    "text_encoder_2": "an SDXL model, with two text encoders",
    "controlnet": "a ControlNet pipeline",
    "image_encoder": "an image-conditioned pipeline",
    "prior": "a model with a prior (unCLIP, Stable Cascade)",
}
_CLASSES = {
    "text_encoder": ("CLIPTextModel", "CLIPTextModelWithProjection"),
    "unet": ("UNet2DConditionModel", "BlockUNet"),
    "vae": ("AutoencoderKL",),
}
_ADDITIONAL_INPUTS = ("addition_embed_type", "class_embed_type", "encoder_hid_dim", "num_class_embeds")


def check_supported(folder: Path, *, source: str) -> None:
    """Refuse a folder that holds another kind of model, from its configurations alone.

    Args:
        folder: a diffusers folder; what is missing in it is not the concern of this function.
        source: the model, named in errors.

    Raises:
        ModelError: naming what the model is, or the field that is not supported.
    """
    kind = _kind(_config(folder / "model_index.json"), _config(folder / "config.json"))
    if kind:
        raise ModelError(f"{source} is {kind}; {_ACCEPTED}")
    for part, accepted in _CLASSES.items():
        config = _config(folder / part / "config.json")
        name = config.get("_class_name") or next(iter(config.get("architectures") or ()), accepted[0])
        if name not in accepted:
            raise ModelError(f"{source}: its {part} is a {name}; {' or '.join(accepted)} is accepted")
    check_unet_config(_config(folder / "unet" / "config.json"), source=source)


def check_unet_config(config: Mapping[str, Any], *, source: str) -> None:
    """Refuse a UNet that has other inputs than a noisy latent, a timestep and a caption.

    Args:
        config: of a UNet2DConditionModel or a BlockUNet.
        source: the model, named in errors.

    Raises:
        ModelError: naming the input that is not supported.
    """
    channels = config.get("in_channels", 4)
    if channels != 4:
        kind = _CHANNELS.get(channels, "another kind of model")
        raise ModelError(f"{source} is {kind}: its UNet has {channels} input channels, not 4; {_ACCEPTED}")
    field = next((field for field in _ADDITIONAL_INPUTS if config.get(field)), None)
    if field:
        kind = "an SDXL model" if config[field] == "text_time" else "another kind of model"
        raise ModelError(f"{source} is {kind}: its UNet has {field} {config[field]!r}; {_ACCEPTED}")
    if config and not isinstance(config.get("sample_size"), int):
        raise ModelError(
            f"{source}: unet/config.json has sample_size {config.get('sample_size')!r}; set it to the side "
            "of the square latent, 64 for images of 512 pixels"
        )


def _kind(index: Mapping[str, Any], config: Mapping[str, Any]) -> str | None:
    """Describe a pipeline that is no text-to-image model, else None."""
    if not index and "ControlNet" in str(config.get("_class_name")):
        return "a ControlNet"
    for component, kind in _COMPONENTS.items():
        # A component that a pipeline leaves out is [null, null].
        if any(index.get(component) or ()):
            return kind
    return None


def _config(path: Path) -> dict[str, Any]:
    """Read a configuration; {} if it is missing or invalid, which whoever needs it reports."""
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}
