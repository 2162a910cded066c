"""CLIP score: the cosine between picture and caption, by any model that open_clip can build.

A scorer folder holds open_clip_config.json (`model_cfg` and `preprocess_cfg`, as on the hub),
model.safetensors and, unless the tokens are CLIP's own, tokenizer/. The miniature's scorer is one; the real
ones, such as ViT-g-14 (SnapFusion Sec. 5), are named models of open_clip with a file of weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTokenizer

from snapfusion.models.tokenizer import tokenize

CONFIG = "open_clip_config.json"
WEIGHTS = "model.safetensors"
TOKENIZER = "tokenizer"

Tokenize = Callable[[Sequence[str]], Tensor]
"""Captions -> token ids int64 [B,L]."""


@dataclass(frozen=True, kw_only=True)
class ClipScorer:
    """An open_clip model with what stands before it.

    Attributes:
        model: its `encode_image` and `encode_text` are used.
        tokenize: captions -> token ids.
        image_size: side of the model's input, in pixels.
        mean: subtracted from each channel of [0, 1] images.
        std: by which each channel is then divided.
    """

    model: open_clip.CLIP
    tokenize: Tokenize
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def prepare(self, images: Tensor) -> Tensor:
        """The model's input float32 [B,3,S,S] of images uint8 [B,3,H,H]: resized (bicubic) and normalized.

        Raises:
            ValueError: unless the images are uint8 [B,3,H,H].
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images are {images.dtype} {tuple(images.shape)}; uint8 [B,3,H,H] is accepted")
        if images.shape[2] != images.shape[3]:
            raise ValueError(f"images are {tuple(images.shape[2:])} pixels; crop them to a square first")
        pixels = images.float() / 255.0
        if images.shape[2] != self.image_size:
            side = (self.image_size, self.image_size)
            pixels = functional.interpolate(pixels, size=side, mode="bicubic", antialias=True).clamp(0.0, 1.0)
        mean, std = (pixels.new_tensor(values).view(1, 3, 1, 1) for values in (self.mean, self.std))
        return (pixels - mean) / std

    @torch.inference_mode()
    def encode_images(self, images: Tensor) -> Tensor:
        """Unit vectors float32 [B,D] of uint8 [B,3,H,H]."""
        return functional.normalize(self.model.encode_image(self.prepare(images)).float(), dim=1)

    @torch.inference_mode()
    def encode_captions(self, captions: Sequence[str]) -> Tensor:
        """Unit vectors float32 [B,D]."""
        tokens = self.tokenize(captions).to(self.model.logit_scale.device)
        return functional.normalize(self.model.encode_text(tokens).float(), dim=1)

    def score(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """The cosine of each picture, uint8 [B,3,H,H], with its own caption: float32 [B] in [-1, 1].

        Raises:
            ValueError: if there are not as many captions as pictures.
        """
        if len(images) != len(captions):
            raise ValueError(f"{len(images)} pictures and {len(captions)} captions; give one for each")
        return (self.encode_images(images) * self.encode_captions(captions)).sum(dim=1)


def build_scorer(config: dict[str, Any], *, tokenizer: CLIPTokenizer) -> ClipScorer:
    """An untrained scorer of an open_clip configuration (`model_cfg`, `preprocess_cfg`)."""
    model = open_clip.CLIP(**config["model_cfg"])
    return ClipScorer(
        model=model,
        tokenize=lambda captions: tokenize(tokenizer, captions),
        image_size=config["model_cfg"]["vision_cfg"]["image_size"],
        mean=tuple(config["preprocess_cfg"]["mean"]),
        std=tuple(config["preprocess_cfg"]["std"]),
    )


def save_scorer(model: nn.Module, folder: Path, *, config: dict[str, Any], tokenizer: CLIPTokenizer) -> None:
    """Write a scorer folder with weights in float16."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors = {
        name: value.half() if value.is_floating_point() else value
        for name, value in model.state_dict().items()
    }
    save_file(tensors, folder / WEIGHTS)
    tokenizer.save_pretrained(folder / TOKENIZER)


def load_scorer(folder: Path) -> ClipScorer:
    """The scorer in a folder that `save_scorer` wrote, in float32.

    Raises:
        ValueError: if the folder lacks its configuration or its weights.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is no scorer folder: it has no {name}")
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    scorer = build_scorer(config, tokenizer=CLIPTokenizer.from_pretrained(folder / TOKENIZER))
    scorer.model.load_state_dict(load_file(folder / WEIGHTS))
    scorer.model.float().eval().requires_grad_(requires_grad=False)
    return scorer


def open_clip_scorer(name: str, *, weights: Path) -> ClipScorer:
    """A model that open_clip knows by name, such as "ViT-g-14", with weights from a file of safetensors.

    Raises:
        ValueError: if open_clip has no such model, or `weights` is not a .safetensors file.
    """
    if name not in open_clip.list_models():
        raise ValueError(f"open_clip has no model {name!r}; open_clip.list_models() names those it has")
    if weights.suffix != ".safetensors" or not weights.is_file():
        raise ValueError(f"{weights} is not a .safetensors file; pickled weights are never opened")
    model = open_clip.create_model(name)
    model.load_state_dict(load_file(weights))
    model.eval().requires_grad_(requires_grad=False)
    preprocess = open_clip.get_model_preprocess_cfg(model)
    return ClipScorer(
        model=model,
        tokenize=open_clip.get_tokenizer(name),
        image_size=open_clip.get_model_config(name)["vision_cfg"]["image_size"],
        mean=tuple(preprocess["mean"]),
        std=tuple(preprocess["std"]),
    )
