"""Weights of PickScore and HPSv2 of a tiny shape, each in the form in which it is published."""

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file

TINY = "tiny-preference-for-tests"


def write_preferences(folder: Path) -> list[dict[str, Any]]:
    """Write the same random network for both, and make its shape known to open_clip; returns the settings."""
    vision = {"image_size": 56, "layers": 2, "width": 64, "head_width": 16, "patch_size": 14}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2}
    (folder / f"{TINY}.json").write_text(
        json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text})
    )
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    # New biases are 0 and new norms 1: noise tells apart what is read in the wrong order.
    tensors = {
        name: value + 0.1 * torch.randn_like(value) if value.ndim else value
        for name, value in open_clip.create_model(TINY).state_dict().items()
    }
    save_file(tensors, folder / "hpsv2.safetensors")
    # Files of transformers 4.27, as PickScore's is, have the numbers of the positions, too.
    positions = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    save_file(in_transformers(tensors) | positions, folder / "pickscore.safetensors")
    return [
        {"name": name, "weights": str(folder / f"{name}.safetensors"), "shape": TINY}
        for name in ("pickscore", "hpsv2")
    ]


def in_transformers(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of open_clip under the names of a CLIPModel, as transformers' own conversion renames them."""
    text, vision = "text_model", "vision_model"
    fixed = {
        "positional_embedding": f"{text}.embeddings.position_embedding.weight",
        "token_embedding.weight": f"{text}.embeddings.token_embedding.weight",
        "visual.class_embedding": f"{vision}.embeddings.class_embedding",
        "visual.conv1.weight": f"{vision}.embeddings.patch_embedding.weight",
        "visual.positional_embedding": f"{vision}.embeddings.position_embedding.weight",
        "logit_scale": "logit_scale",
    }
    renamed = {}
    for name, value in tensors.items():
        if name == "text_projection":
            renamed["text_projection.weight"] = value.T.contiguous()
        elif name == "visual.proj":
            renamed["visual_projection.weight"] = value.T.contiguous()
        elif name in fixed:
            renamed[fixed[name]] = value
        elif ".in_proj_" in name:
            block, kind = _block(name).split(".attn.in_proj_")
            for part, piece in zip("qkv", value.chunk(3), strict=True):
                renamed[f"{block}.self_attn.{part}_proj.{kind}"] = piece.contiguous()
        else:
            renamed[_block(name)] = value
    return renamed


def _block(name: str) -> str:
    side = "vision_model" if name.startswith("visual.") else "text_model"
    name = name.removeprefix("visual.")
    for ours, theirs in (
        ("transformer.resblocks", "encoder.layers"),
        ("attn.out_proj", "self_attn.out_proj"),
        ("ln_1", "layer_norm1"),
        ("ln_2", "layer_norm2"),
        ("mlp.c_fc", "mlp.fc1"),
        ("mlp.c_proj", "mlp.fc2"),
        ("ln_pre", "pre_layrnorm"),
        ("ln_post", "post_layernorm"),
        ("ln_final", "final_layer_norm"),
    ):
        name = name.replace(ours, theirs)
    return f"{side}.{name}"
