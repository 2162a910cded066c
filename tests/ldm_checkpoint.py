"""Writes a model as a single-file checkpoint with LDM keys: the inverse of diffusers' conversion."""

import re
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

_UNET_NAMES = (
    (r"^time_embedding\.linear_1", "time_embed.0"),
    (r"^time_embedding\.linear_2", "time_embed.2"),
    (r"^conv_in", "input_blocks.0.0"),
    (r"^conv_norm_out", "out.0"),
    (r"^conv_out", "out.2"),
    (r"^mid_block\.resnets\.0", "middle_block.0"),
    (r"^mid_block\.attentions\.0", "middle_block.1"),
    (r"^mid_block\.resnets\.1", "middle_block.2"),
    (r"^(middle_block\.[02]\.|.*\.resnets\.\d\.)norm1", r"\1in_layers.0"),
    (r"^(middle_block\.[02]\.|.*\.resnets\.\d\.)conv1", r"\1in_layers.2"),
    (r"time_emb_proj", "emb_layers.1"),
    (r"^(middle_block\.[02]\.|.*\.resnets\.\d\.)norm2", r"\1out_layers.0"),
    (r"^(middle_block\.[02]\.|.*\.resnets\.\d\.)conv2", r"\1out_layers.3"),
    (r"conv_shortcut", "skip_connection"),
)
_VAE_NAMES = (
    (r"conv_norm_out", "norm_out"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"down_blocks\.(\d)\.resnets", r"down.\1.block"),
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
)
_OPEN_CLIP_NAMES = (
    (r"^embeddings\.token_embedding\.weight", "token_embedding.weight"),
    (r"^embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"^final_layer_norm", "ln_final"),
    (r"^encoder\.layers", "transformer.resblocks"),
    (r"layer_norm", "ln_"),
    (r"mlp\.fc1", "mlp.c_fc"),
    (r"mlp\.fc2", "mlp.c_proj"),
    (r"self_attn\.out_proj", "attn.out_proj"),
)


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


def ldm_tensors(bundle: Bundle) -> dict[str, Tensor]:
    """The tensors of a model under LDM keys."""
    unet = {f"model.diffusion_model.{key}": value for key, value in _unet(bundle.unet.state_dict()).items()}
    vae = {f"first_stage_model.{key}": value for key, value in _vae(bundle.vae.state_dict()).items()}
    text = bundle.text_encoder.state_dict()
    if bundle.text_encoder.config.hidden_act == "gelu":
        return (
            unet | vae | {f"cond_stage_model.model.{key}": value for key, value in _open_clip(text).items()}
        )
    return unet | vae | {f"cond_stage_model.transformer.text_model.{key}": text[key] for key in text}


def write_checkpoint(
    path: Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None
) -> Path:
    """Write tensors as one safetensors file."""
    contiguous = {key: value.clone().contiguous() for key, value in tensors.items()}
    save_file(contiguous, path, metadata={"format": "pt", **(metadata or {})})
    return path


def _rename(key: str, names: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in names:
        key = re.sub(pattern, replacement, key)
    return key


def _unet(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    def level(match: re.Match[str]) -> str:
        side, block, kind, index = match.group(1), int(match.group(2)), match.group(3), int(match.group(4))
        part = {"resnets": 0, "attentions": 1}.get(kind)
        if kind == "downsamplers":
            return f"input_blocks.{3 * block + 3}.0.op"
        if kind == "upsamplers":
            return f"output_blocks.{3 * block + 2}.{1 if block == 0 else 2}.conv"
        number = 3 * block + index + (1 if side == "down" else 0)
        return f"{'input' if side == 'down' else 'output'}_blocks.{number}.{part}"

    blocks = r"^(down|up)_blocks\.(\d)\.(resnets|attentions|downsamplers|upsamplers)\.(\d)(?:\.conv(?=\.))?"
    return {re.sub(blocks, level, _rename(key, _UNET_NAMES)): value for key, value in tensors.items()}


def _vae(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    levels = 1 + max(int(key.split(".")[2]) for key in tensors if key.startswith("decoder.up_blocks."))

    def up(match: re.Match[str]) -> str:
        kind = "block" if match.group(2) == "resnets" else "upsample"
        return f"up.{levels - 1 - int(match.group(1))}.{kind}"

    renamed = {
        re.sub(r"up_blocks\.(\d)\.(resnets|upsamplers\.0)", up, _rename(key, _VAE_NAMES)): value
        for key, value in tensors.items()
    }
    attention = re.compile(r"mid\.attn_1\.(q|k|v|proj_out)\.weight")
    return {key: value[..., None, None] if attention.search(key) else value for key, value in renamed.items()}


def _open_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed = {_rename(key, _OPEN_CLIP_NAMES): value for key, value in tensors.items()}
    joined: dict[str, Tensor] = {}
    for key, value in renamed.items():
        match = re.search(r"(.*)self_attn\.([qkv])_proj\.(weight|bias)", key)
        if match and match.group(2) == "q":
            parts = [renamed[key.replace(".q_proj.", f".{letter}_proj.")] for letter in "qkv"]
            joined[f"{match.group(1)}attn.in_proj_{match.group(3)}"] = torch.cat(parts)
        elif not match:
            joined[key] = value
    layers = 1 + max(int(key.split(".")[2]) for key in joined if key.startswith("transformer.resblocks."))
    # The file has one layer more than Stable Diffusion uses, and a projection.
    last = {
        key.replace(f"resblocks.{layers - 1}.", f"resblocks.{layers}."): value
        for key, value in joined.items()
        if f"resblocks.{layers - 1}." in key
    }
    return joined | last | {"text_projection": torch.eye(64), "logit_scale": torch.ones(())}
