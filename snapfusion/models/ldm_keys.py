"""The tensors of a model under LDM keys, as in single-file checkpoints: diffusers' conversion reversed.

LDM numbers the blocks of a UNet through, and counts the levels of a VAE's decoder from the finest; a VAE's
attention consists of 1x1 convolutions there. OpenCLIP, the text encoder of Stable Diffusion 2, has the
projections of attention in one matrix.
"""

import re
from collections.abc import Mapping
from typing import Final

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor

from snapfusion.models import sd2
from snapfusion.models.bundle import Bundle
from snapfusion.models.single_file_config import CLIP_PREFIX, OPEN_CLIP_PREFIX, UNET_PREFIX, VAE_PREFIX

_UNET_LAYERS: Final = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
_UNET_PARTS: Final = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_ATTENTION: Final = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP_LAYER: Final = re.compile(r"encoder\.layers\.(\d+)\.(.+)")
_OPEN_CLIP_KEYS: Final = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_OPEN_CLIP_PARTS: Final = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def ldm_tensors(bundle: Bundle) -> dict[str, Tensor]:
    """Return the tensors of a model whose UNet is of diffusers' class under LDM keys.

    The file of a Stable Diffusion 2 has one layer of its text encoder more than is read. diffusers does not
    keep it, so that here it is zero.
    """
    unet = _renamed(bundle.unet.state_dict(), modules=_unet_modules(bundle.unet), parts=_UNET_PARTS)
    vae = _vae_tensors(bundle.vae)
    text = bundle.text_encoder.state_dict()
    if sd2.is_text_encoder(bundle.text_encoder.config):
        captions = {f"{OPEN_CLIP_PREFIX}{key}": value for key, value in _open_clip_tensors(text).items()}
    else:
        captions = {f"{CLIP_PREFIX}text_model.{key}": value for key, value in text.items()}
    return {
        **{f"{UNET_PREFIX}{key}": value for key, value in unet.items()},
        **{f"{VAE_PREFIX}{key}": value for key, value in vae.items()},
        **captions,
    }


def _renamed(
    tensors: Mapping[str, Tensor], *, modules: Mapping[str, str], parts: Mapping[str, str]
) -> dict[str, Tensor]:
    """Rename the module that begins a key by `modules`, and the part of it that follows by `parts`."""
    renamed = {}
    for key, value in tensors.items():
        module = max((name for name in modules if key.startswith(f"{name}.")), key=len, default=None)
        if module is None:
            raise KeyError(key)
        part, dot, rest = key.removeprefix(f"{module}.").partition(".")
        renamed[f"{modules[module]}.{parts.get(part, part)}{dot}{rest}"] = value
    return renamed


def _unet_modules(unet: UNet2DConditionModel) -> dict[str, str]:
    """LDM's name of each module of a UNet by diffusers' name."""
    names = dict(_UNET_LAYERS)
    number = 0
    for level, stage in enumerate(unet.down_blocks):
        for layer in range(len(stage.resnets)):
            number += 1
            names[f"down_blocks.{level}.resnets.{layer}"] = f"input_blocks.{number}.0"
            names[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{number}.1"
        number += 1
        names[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
    number = -1
    for level, stage in enumerate(unet.up_blocks):
        for layer in range(len(stage.resnets)):
            number += 1
            names[f"up_blocks.{level}.resnets.{layer}"] = f"output_blocks.{number}.0"
            names[f"up_blocks.{level}.attentions.{layer}"] = f"output_blocks.{number}.1"
        upsampler = 2 if hasattr(stage, "attentions") else 1
        names[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{number}.{upsampler}.conv"
    return names


def _vae_tensors(vae: AutoencoderKL) -> dict[str, Tensor]:
    renamed = _renamed(vae.state_dict(), modules=_vae_modules(vae), parts={"conv_shortcut": "nin_shortcut"})
    projection = re.compile(r"mid\.attn_1\.(q|k|v|proj_out)\.weight$")
    return {
        key: value[..., None, None] if projection.search(key) else value for key, value in renamed.items()
    }


def _vae_modules(vae: AutoencoderKL) -> dict[str, str]:
    """LDM's name of each module of a VAE by diffusers' name."""
    names = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for side in ("encoder", "decoder"):
        names |= {
            f"{side}.conv_in": f"{side}.conv_in",
            f"{side}.conv_norm_out": f"{side}.norm_out",
            f"{side}.conv_out": f"{side}.conv_out",
            f"{side}.mid_block.resnets.0": f"{side}.mid.block_1",
            f"{side}.mid_block.resnets.1": f"{side}.mid.block_2",
        }
        for ours, theirs in _VAE_ATTENTION.items():
            names[f"{side}.mid_block.attentions.0.{ours}"] = f"{side}.mid.attn_1.{theirs}"
    for level, stage in enumerate(vae.encoder.down_blocks):
        for layer in range(len(stage.resnets)):
            names[f"encoder.down_blocks.{level}.resnets.{layer}"] = f"encoder.down.{level}.block.{layer}"
        names[f"encoder.down_blocks.{level}.downsamplers.0"] = f"encoder.down.{level}.downsample"
    finest = len(vae.decoder.up_blocks) - 1
    for level, stage in enumerate(vae.decoder.up_blocks):
        theirs = f"decoder.up.{finest - level}"
        for layer in range(len(stage.resnets)):
            names[f"decoder.up_blocks.{level}.resnets.{layer}"] = f"{theirs}.block.{layer}"
        names[f"decoder.up_blocks.{level}.upsamplers.0"] = f"{theirs}.upsample"
    return names


def _open_clip_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    layers = 0
    for key, value in tensors.items():
        if (found := _OPEN_CLIP_LAYER.fullmatch(key)) is None:
            renamed[_OPEN_CLIP_KEYS[key]] = value
            continue
        layers = max(layers, int(found[1]) + 1)
        block, (part, _, kind) = f"transformer.resblocks.{found[1]}", found[2].rpartition(".")
        if part in _OPEN_CLIP_PARTS:
            renamed[f"{block}.{_OPEN_CLIP_PARTS[part]}.{kind}"] = value
        elif part == "self_attn.q_proj":
            joined = [tensors[key.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            renamed[f"{block}.attn.in_proj_{kind}"] = torch.cat(joined)
    first = {key: value for key, value in renamed.items() if key.startswith("transformer.resblocks.0.")}
    unread = {key.replace(".0.", f".{layers}.", 1): torch.zeros_like(value) for key, value in first.items()}
    return renamed | unread
