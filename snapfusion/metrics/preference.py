"""PickScore and HPSv2: scores by networks of CLIP's shape that were trained on which images people prefer.

PickScore (Kirstain et al. 2023) is published as a CLIPModel of transformers, HPSv2 (Wu et al. 2023) as
weights of open_clip, both of the shape ViT-H-14. Each is read by that library and scored as its authors do;
their own packages are not used, because of their pins
(transformers 4.27.3; protobuf below 4).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import open_clip
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from snapfusion.metrics.clip import ClipScorer, open_clip_config, open_clip_scorer
from snapfusion.metrics.pinned import check_safetensors, load_pinned
from snapfusion.metrics.settings import Preference
from snapfusion.models.tokenizer import CLIP_VOCABULARY, clip_tokenizer, tokenize

_MLP_RATIO = 4.0
"""Of open_clip's networks whose configuration has none."""


class TransformersClip(nn.Module):
    """A CLIPModel of transformers with the methods of open_clip's that a scorer uses."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.network = CLIPModel(config)

    @property
    def logit_scale(self) -> Tensor:
        """Logarithm of the factor of the cosines in training."""
        return self.network.logit_scale

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Features [B,D] of pixels float32 [B,3,S,S]."""
        return self.network.get_image_features(pixel_values=pixels).pooler_output

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Features [B,D] of token ids int64 [B,L]."""
        return self.network.get_text_features(input_ids=tokens).pooler_output


def preference_scorer(name: Preference, *, shape: str, weights: Path) -> ClipScorer:
    """PickScore or HPSv2 from a file of safetensors.

    Args:
        name: of the score, which says by which library it is read, and whether cosines are scaled.
        shape: name of its configuration in open_clip, "ViT-H-14" as published.
        weights: the file.

    Raises:
        ValueError: if open_clip has no such shape, or `weights` is no .safetensors file of it.
    """
    return _SCORERS[name](shape, weights)


def transformers_config(shape: str) -> CLIPConfig:
    """The configuration of a CLIPModel of the same shape as an open_clip model.

    Raises:
        ValueError: if open_clip has no such model.
    """
    config = open_clip_config(shape)
    text, vision = config["text_cfg"], config["vision_cfg"]
    activation = "quick_gelu" if config.get("quick_gelu") else "gelu"
    return CLIPConfig(
        projection_dim=config["embed_dim"],
        text_config={
            **_tower(text, heads=text["heads"], activation=activation),
            "vocab_size": text["vocab_size"],
            "max_position_embeddings": text["context_length"],
            # The end token has the highest id: open_clip pools at the position of the maximum.
            "eos_token_id": CLIP_VOCABULARY - 1,
        },
        vision_config={
            **_tower(vision, heads=vision["width"] // vision["head_width"], activation=activation),
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
        },
    )


def _tower(config: dict[str, Any], *, heads: int, activation: str) -> dict[str, Any]:
    """What the configurations of both transformers have."""
    return {
        "hidden_size": config["width"],
        "intermediate_size": int(config["width"] * config.get("mlp_ratio", _MLP_RATIO)),
        "num_hidden_layers": config["layers"],
        "num_attention_heads": heads,
        "hidden_act": activation,
    }


def _pickscore(shape: str, weights: Path) -> ClipScorer:
    check_safetensors(weights)
    config = transformers_config(shape)
    model = TransformersClip(config)
    # Files of 2023 have the numbers of the positions, too.
    load_pinned(model.network, weights, name=f"a CLIPModel of shape {shape}", unused=r".+\.position_ids")
    tokenizer = clip_tokenizer()
    return ClipScorer(
        model=model.eval(),
        tokenize=lambda captions: tokenize(tokenizer, captions),
        image_size=config.vision_config.image_size,
        mean=open_clip.OPENAI_DATASET_MEAN,
        std=open_clip.OPENAI_DATASET_STD,
        scaled=True,
    )


def _hpsv2(shape: str, weights: Path) -> ClipScorer:
    return open_clip_scorer(shape, weights=weights)


_SCORERS: Final[dict[Preference, Callable[[str, Path], ClipScorer]]] = {
    "pickscore": _pickscore,
    "hpsv2": _hpsv2,
}
