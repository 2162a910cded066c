"""What pictures are judged by: features for FID, a CLIP scorer, and the miniature's oracle of attributes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipelines.stages.settings import FeatureSettings, MetricSettings, _file
from snapfusion.metrics.clip import load_scorer, open_clip_scorer
from snapfusion.metrics.inception import load_inception
from snapfusion.mini.oracle import load_oracle, scene_labels
from snapfusion.mini.scenes import parse_caption
from snapfusion.mini.weights import WEIGHTS


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


class MetricNetworks:
    """All that pictures are judged by, on one device."""

    def __init__(self, settings: MetricSettings, *, device: str) -> None:
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
