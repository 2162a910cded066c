"""What pictures are judged by: features for FID, a CLIP scorer, and the miniature's oracle of attributes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from snapfusion.metrics import inception
from snapfusion.metrics.clip import load_scorer, open_clip_scorer
from snapfusion.metrics.inception import Resize, load_inception
from snapfusion.metrics.pinned import file_hash, pinned_file
from snapfusion.mini import oracle
from snapfusion.mini.oracle import load_oracle, scene_labels
from snapfusion.mini.scenes import ATTRIBUTES, IMAGE_SIZE, parse_caption
from snapfusion.mini.weights import WEIGHTS
from snapfusion.settings import Settings

_SHA256 = r"^[0-9a-f]{64}$"


class FeatureSettings(Settings):
    """Where the features of FID come from.

    Attributes:
        network: the miniature's oracle, or Inception v3.
        weights: of Inception, as `pinned_file` accepts it; the oracle is bundled.
        sha256: of that file.
        resize: the kernel from the picture's size to Inception's 299 pixels.
    """

    network: Literal["oracle", "inception"] = "oracle"
    weights: str | None = None
    sha256: str | None = Field(None, pattern=_SHA256)
    resize: Resize = "bicubic"

    @model_validator(mode="after")
    def _has_weights(self) -> FeatureSettings:
        if (self.network == "inception") != (self.weights is not None):
            raise ValueError("weights are a file for inception, and null for the oracle, which is bundled")
        return self


class ScorerSettings(Settings):
    """Which CLIP scores.

    Attributes:
        network: "mini" is the bundled scorer; any other name is a model of open_clip, such as "ViT-g-14".
        weights: of the latter, as `pinned_file` accepts it.
        sha256: of that file.
    """

    network: str = "mini"
    weights: str | None = None
    sha256: str | None = Field(None, pattern=_SHA256)

    @model_validator(mode="after")
    def _has_weights(self) -> ScorerSettings:
        if (self.network != "mini") != (self.weights is not None):
            raise ValueError(
                "weights are a file for a model of open_clip, and null for mini, which is bundled"
            )
        return self


class Judging(Settings):
    """What pictures are judged by. The defaults are the miniature's.

    Attributes:
        features: for FID.
        scorer: for CLIP.
    """

    features: FeatureSettings = FeatureSettings()
    scorer: ScorerSettings = ScorerSettings()

    @property
    def feature_count(self) -> int:
        """Numbers in a feature vector."""
        return oracle.FEATURES if self.features.network == "oracle" else inception.FEATURES

    @property
    def attribute_count(self) -> int:
        """Attributes that the oracle reads; 0 without the oracle."""
        return len(ATTRIBUTES) if self.features.network == "oracle" else 0

    @property
    def side(self) -> int | None:
        """Pixels of the side of the pictures that can be judged; None where they are resized."""
        return IMAGE_SIZE if self.features.network == "oracle" else None

    def describe_features(self) -> dict[str, Any]:
        """What identifies the features: the network, the SHA-256 of its weights, the kernel."""
        if self.features.network == "oracle":
            return {"network": "oracle", "sha256": file_hash(WEIGHTS / "oracle" / "model.safetensors")}
        return {
            "network": "inception",
            "sha256": file_hash(_file(self.features)),
            "resize": self.features.resize,
            "side": inception.SIDE,
        }

    def describe_scorer(self) -> dict[str, Any]:
        """What identifies the CLIP score: the network, and the SHA-256 of its weights."""
        bundled = self.scorer.network == "mini"
        weights = WEIGHTS / "scorer" / "model.safetensors" if bundled else _file(self.scorer)
        return {"network": self.scorer.network, "sha256": file_hash(weights)}


class FeatureReader:
    """The network whose features FID is measured in."""

    def __init__(self, settings: FeatureSettings, *, device: str) -> None:
        self.device = device
        if settings.network == "oracle":
            self._network = load_oracle().to(device)
            self._features = self._network.features
        else:
            self._features = load_inception(_file(settings), resize=settings.resize).to(device)

    @torch.inference_mode()
    def features(self, images: Tensor) -> Tensor:
        """float32 [B,D] on the CPU, of uint8 [B,3,H,W]."""
        return self._features(images.to(self.device)).float().cpu()


class Judge:
    """All that pictures are judged by, on one device."""

    def __init__(self, settings: Judging, *, device: str) -> None:
        self.device = device
        self._reader = FeatureReader(settings.features, device=device)
        self._oracle = load_oracle().to(device) if settings.attribute_count else None
        if settings.scorer.network == "mini":
            self._scorer = load_scorer(WEIGHTS / "scorer")
        else:
            self._scorer = open_clip_scorer(settings.scorer.network, weights=_file(settings.scorer))
        self._scorer.model.to(device)

    def features(self, images: Tensor) -> Tensor:
        """float32 [B,D] on the CPU, of uint8 [B,3,H,W]."""
        return self._reader.features(images)

    def clip(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """Cosine of each picture, uint8 [B,3,H,W], with its caption: float32 [B] on the CPU."""
        return self._scorer.score(images.to(self.device), captions).cpu()

    def attributes(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """Which attributes of a picture are as its caption says, uint8 [B,5]; [B,0] without the oracle.

        Raises:
            ValueError: if the oracle cannot read a caption.
        """
        if self._oracle is None:
            return torch.empty(len(images), 0, dtype=torch.uint8)
        said = scene_labels([parse_caption(caption) for caption in captions])
        return (self._oracle.labels(images.to(self.device)).cpu() == said).to(torch.uint8)


def _file(settings: FeatureSettings | ScorerSettings) -> Path:
    if settings.weights is None:
        raise ValueError(f"{settings.network} needs a file of weights")
    return pinned_file(settings.weights, sha256=settings.sha256)
