"""CLIP score: the cosine between image and caption, by any model that open_clip can build.

A scorer folder holds open_clip_config.json (`model_cfg` and `preprocess_cfg`, as on the hub),
model.safetensors and tokenizer/. The miniature's scorer is one; the scorers of full-size models, such as
ViT-g-14 (SnapFusion Sec. 5), are open_clip models by name with a file of weights.
"""

import json
import logging
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

from snapfusion.metrics.images import resize_images
from snapfusion.metrics.pinned import check_safetensors, load_pinned
from snapfusion.models.tokenizer import tokenize
from snapfusion.records import parse_record

CONFIG = "open_clip_config.json"
WEIGHTS = "model.safetensors"
TOKENIZER = "tokenizer"

Tokenize = Callable[[Sequence[str]], Tensor]
"""Captions -> token ids int64 [B,L]."""


@dataclass(frozen=True, kw_only=True)
class ClipScorer:
    """A network of CLIP's shape with its preprocessing.

    Attributes:
        model: of open_clip, or another one with its `encode_image`, `encode_text` and `logit_scale`.
        tokenize: captions -> token ids.
        image_size: side of the model's input, in pixels.
        mean: subtracted from each channel of [0, 1] images.
        std: by which each channel is then divided.
        scaled: whether a score is the cosine times the model's own scale, exp(logit_scale).
    """

    model: open_clip.CLIP
    tokenize: Tokenize
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scaled: bool = False

    def prepare(self, images: Tensor) -> Tensor:
        """The model's input float32 [B,3,S,S] of images uint8 [B,3,H,H]: resized (bicubic) and normalized.

        Raises:
            ValueError: unless the images are uint8 [B,3,H,H].
        """
        if images.shape[-2] != images.shape[-1]:
            raise ValueError(f"images are {tuple(images.shape[-2:])} pixels; crop them to a square first")
        pixels = resize_images(images, size=self.image_size)
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
        """The cosine of each image, uint8 [B,3,H,H], with its own caption: float32 [B] in [-1, 1].

        If `scaled`, times the model's scale.

        Raises:
            ValueError: if the numbers of captions and images differ.
        """
        if len(images) != len(captions):
            raise ValueError(f"{len(images)} images and {len(captions)} captions; give one for each")
        cosines = (self.encode_images(images) * self.encode_captions(captions)).sum(dim=1)
        return cosines * self.model.logit_scale.detach().exp() if self.scaled else cosines


def build_scorer(config: dict[str, Any], *, tokenizer: CLIPTokenizer) -> ClipScorer:
    """An untrained scorer of an open_clip configuration (`model_cfg`, `preprocess_cfg`)."""
    model_config, preprocess = config["model_cfg"], config["preprocess_cfg"]
    return ClipScorer(
        model=open_clip.CLIP(**model_config),
        tokenize=lambda captions: tokenize(tokenizer, captions),
        image_size=model_config["vision_cfg"]["image_size"],
        mean=tuple(preprocess["mean"]),
        std=tuple(preprocess["std"]),
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
    """Load a folder of `save_scorer`, in float32.

    Raises:
        ValueError: if the folder lacks its configuration or its weights.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is no scorer folder: it has no {name}")
    config = parse_record((folder / CONFIG).read_bytes(), name=str(folder / CONFIG))
    scorer = build_scorer(config, tokenizer=CLIPTokenizer.from_pretrained(folder / TOKENIZER))
    # Stored in float16; the parameters are float32, so loading converts them.
    scorer.model.load_state_dict(load_file(folder / WEIGHTS))
    scorer.model.float().eval().requires_grad_(requires_grad=False)
    return scorer


def open_clip_scorer(name: str, *, weights: Path) -> ClipScorer:
    """An open_clip model by name, such as "ViT-g-14", with weights from a file of safetensors.

    Raises:
        ValueError: if open_clip has no such model, or `weights` is no .safetensors file that holds it.
    """
    check_safetensors(weights)
    config = open_clip_config(name)
    model = _create_model(name)
    load_pinned(model, weights, name=f"open_clip's {name}")
    preprocess = open_clip.get_model_preprocess_cfg(model)
    return ClipScorer(
        model=model,
        tokenize=open_clip.get_tokenizer(name),
        image_size=config["vision_cfg"]["image_size"],
        mean=tuple(preprocess["mean"]),
        std=tuple(preprocess["std"]),
    )


def _create_model(name: str) -> open_clip.CLIP:
    """The model with random weights, without open_clip's warning of that: they are replaced."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        return open_clip.create_model(name)
    finally:
        root.setLevel(level)


def open_clip_config(name: str) -> dict[str, Any]:
    """The configuration of an open_clip model: `embed_dim`, `vision_cfg`, `text_cfg`.

    Raises:
        ValueError: if open_clip has no such model.
    """
    if name not in open_clip.list_models():
        raise ValueError(f"open_clip has no model {name!r}; open_clip.list_models() names those it has")
    return dict(open_clip.get_model_config(name))
