"""Deriving the networks' configurations of a single-file checkpoint from the shapes of its tensors.

A single file of Stable Diffusion (LDM keys) has no configurations. Its sizes follow from its tensors; the
rest (the number of attention heads, the scaling factor, the activation) is that of SD 1.5 or 2.1.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from snapfusion.models import sd2, sd15
from snapfusion.models.errors import ModelError

UNET_PREFIX: Final = "model.diffusion_model."
VAE_PREFIX: Final = "first_stage_model."
CLIP_PREFIX: Final = "cond_stage_model.transformer."
OPEN_CLIP_PREFIX: Final = "cond_stage_model.model."
_HEAD_WIDTH = 64  # of both text encoders, and of the UNet of SD 2
Shapes = Mapping[str, tuple[int, ...]]
"""The shape of each tensor by its key."""

_OTHER_KINDS = {
    "conditioner.embedders.": "an SDXL checkpoint",
    "model.diffusion_model.joint_blocks.": "an SD3 checkpoint",
    "model.diffusion_model.double_blocks.": "a Flux checkpoint",
    "double_blocks.": "a Flux checkpoint",
    "joint_blocks.": "an SD3 checkpoint",
    "control_model.": "a ControlNet",
    "lora_": "a LoRA, to be given as an option: MODEL?lora=FILE",
    "emb_params": "a textual inversion, to be given as an option: MODEL?embedding=FILE",
}


@dataclass(frozen=True, kw_only=True)
class SingleFileConfigs:
    """Configurations of a single-file checkpoint's networks; `sd2` if it has the text encoder of SD 2."""

    text_encoder: dict[str, Any]
    unet: dict[str, Any]
    vae: dict[str, Any]
    sd2: bool


def derive_configs(shapes: Shapes, *, size: int | None, source: str) -> SingleFileConfigs:
    """Derive the configurations of a checkpoint of Stable Diffusion 1 or 2.

    Args:
        shapes: of all tensors of the file.
        size: side of its images in pixels; None for 512 of SD 1 and 768 of SD 2.
        source: the model, named in errors.

    Raises:
        ModelError: naming what the file is, or what it lacks.
    """
    kind = next((kind for prefix, kind in _OTHER_KINDS.items() if _has(shapes, prefix)), None)
    if kind:
        raise ModelError(f"{source} is {kind}; a checkpoint of Stable Diffusion 1 or 2 is accepted")
    needed = {"UNet": UNET_PREFIX, "VAE": VAE_PREFIX, "text encoder": "cond_stage_model."}
    for network, prefix in needed.items():
        if not _has(shapes, prefix):
            raise ModelError(
                f"{source} has no {network} ({prefix}*); a whole checkpoint of SD 1 or 2 is needed"
            )
    try:
        return _derive(shapes, size=size)
    except (KeyError, IndexError) as error:
        raise ModelError(
            f"{source} has not the layout of Stable Diffusion 1 or 2: {error} is missing"
        ) from None


def _derive(shapes: Shapes, *, size: int | None) -> SingleFileConfigs:
    open_clip = _has(shapes, OPEN_CLIP_PREFIX)
    vae = _vae(shapes)
    unet = _unet(shapes, base=sd2.UNET if open_clip else sd15.UNET)
    if open_clip:  # heads of SD 2 are 64 wide; SD 1 has 8 heads of any width
        unet["attention_head_dim"] = tuple(
            max(1, width // _HEAD_WIDTH) for width in unet["block_out_channels"]
        )
    cell = 2 ** (len(vae["block_out_channels"]) - 1)
    if size is not None:
        unet["sample_size"], vae["sample_size"] = size // cell, size
    text_encoder = _open_clip(shapes) if open_clip else _clip(shapes)
    return SingleFileConfigs(text_encoder=text_encoder, unet=unet, vae=vae, sd2=open_clip)


def _unet(shapes: Shapes, *, base: Mapping[str, Any]) -> dict[str, Any]:
    """Four levels of two residual blocks each, as all of SD 1 and 2; only the widths differ."""
    first = shapes[f"{UNET_PREFIX}input_blocks.0.0.weight"]
    widths = [shapes[f"{UNET_PREFIX}input_blocks.{n}.0.out_layers.3.weight"][0] for n in (1, 4, 7, 10)]
    attention = f"{UNET_PREFIX}input_blocks.1.1"
    context = shapes[f"{attention}.transformer_blocks.0.attn2.to_k.weight"][1]
    return {
        **base,
        "in_channels": first[1],
        "block_out_channels": tuple(widths),
        "cross_attention_dim": context,
        "use_linear_projection": len(shapes[f"{attention}.proj_in.weight"]) == 2,
    }


def _vae(shapes: Shapes) -> dict[str, Any]:
    down = f"{VAE_PREFIX}encoder.down"
    levels = 1 + max(_numbers(shapes, rf"{re.escape(down)}\.(\d+)\."))
    widths = [shapes[f"{down}.{level}.block.0.conv1.weight"][0] for level in range(levels)]
    return {
        **sd15.VAE,
        "latent_channels": shapes[f"{VAE_PREFIX}decoder.conv_in.weight"][1],
        "block_out_channels": tuple(widths),
        "layers_per_block": 1 + max(_numbers(shapes, rf"{re.escape(down)}\.0\.block\.(\d+)\.")),
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
    }


def _clip(shapes: Shapes) -> dict[str, Any]:
    """The text encoder of SD 1; some checkpoints omit `text_model.`."""
    nested = _has(shapes, f"{CLIP_PREFIX}text_model.")
    prefix = f"{CLIP_PREFIX}text_model." if nested else CLIP_PREFIX
    vocabulary, width = shapes[f"{prefix}embeddings.token_embedding.weight"]
    return {
        **sd15.TEXT_ENCODER,
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": shapes[f"{prefix}encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": 1 + max(_numbers(shapes, rf"{re.escape(prefix)}encoder\.layers\.(\d+)\.")),
        "num_attention_heads": max(1, width // _HEAD_WIDTH),
        "max_position_embeddings": shapes[f"{prefix}embeddings.position_embedding.weight"][0],
        "projection_dim": width,
    }


def _open_clip(shapes: Shapes) -> dict[str, Any]:
    """The text encoder of SD 2, without the last layer of OpenCLIP, which is in the file and not used."""
    vocabulary, width = shapes[f"{OPEN_CLIP_PREFIX}token_embedding.weight"]
    layers = f"{OPEN_CLIP_PREFIX}transformer.resblocks"
    return {
        **sd2.TEXT_ENCODER,
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": shapes[f"{layers}.0.mlp.c_fc.weight"][0],
        "num_hidden_layers": max(_numbers(shapes, rf"{re.escape(layers)}\.(\d+)\.")),
        "num_attention_heads": max(1, width // _HEAD_WIDTH),
        "max_position_embeddings": shapes[f"{OPEN_CLIP_PREFIX}positional_embedding"][0],
    }


def _has(shapes: Shapes, prefix: str) -> bool:
    return any(key.startswith(prefix) for key in shapes)


def _numbers(shapes: Shapes, pattern: str) -> list[int]:
    """The numbers that a pattern finds in the keys; at least one."""
    found = [int(match.group(1)) for key in shapes if (match := re.match(pattern, key))]
    if not found:
        raise KeyError(pattern)
    return found
