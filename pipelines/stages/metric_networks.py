"""Networks that score images: features for FID, a CLIP scorer, and the miniature's oracle of attributes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipelines.stages.settings import FeatureSettings, MetricSettings, PreferenceSettings, ScorerSettings
from snapfusion.metrics.clip import load_scorer, open_clip_scorer
from snapfusion.metrics.inception import load_inception
from snapfusion.metrics.pinned import hash_of, pinned_file
from snapfusion.metrics.preference import preference_scorer
from snapfusion.metrics.settings import INCEPTION_SIZE
from snapfusion.mini.oracle import load_oracle, scene_labels
from snapfusion.mini.scenes import parse_caption
from snapfusion.mini.weights import WEIGHTS


def describe_features(settings: FeatureSettings) -> dict[str, Any]:
    """The identity of the features: the network, the SHA-256 of its weights, and how images are resized."""
    prepared = {} if settings.weights is None else {"resize": settings.resize, "side": INCEPTION_SIZE}
    # Absent unless given, so that tables made before the option existed keep their identity.
    scaled = {} if settings.scaled_to is None else {"scaled_to": settings.scaled_to, "kernel": "lanczos"}
    return _describe(settings, bundled="oracle") | prepared | scaled


def describe_scorer(settings: ScorerSettings) -> dict[str, Any]:
    """The identity of the CLIP score: the network and the SHA-256 of its weights."""
    return _describe(settings, bundled="scorer")


def describe_preferences(settings: Sequence[PreferenceSettings]) -> dict[str, dict[str, Any]]:
    """The identity of each preference score: the network's shape and the SHA-256 of its weights."""
    return {
        one.name: {"shape": one.shape, "sha256": hash_of(pinned_file(one.weights, sha256=one.sha256))}
        for one in settings
    }


def _describe(settings: FeatureSettings | ScorerSettings, *, bundled: str) -> dict[str, Any]:
    return {"network": settings.network, "sha256": hash_of(_weights(settings, bundled=bundled))}


def _weights(settings: FeatureSettings | ScorerSettings, *, bundled: str) -> Path:
    """The file that the settings name, or that of a bundled network, which has none."""
    if settings.weights is None:
        return WEIGHTS / bundled / "model.safetensors"
    return pinned_file(settings.weights, sha256=settings.sha256)


class FeatureReader:
    """The network that extracts the features for FID."""

    def __init__(self, settings: FeatureSettings, *, device: str) -> None:
        self.device = device
        self.scaled_to = settings.scaled_to
        self._oracle = load_oracle().to(device) if settings.network == "oracle" else None
        if self._oracle is not None:
            self._features = self._oracle.features
        else:
            weights = _weights(settings, bundled="oracle")
            self._features = load_inception(weights, resize=settings.resize).to(device)

    @torch.inference_mode()
    def features(self, images: Tensor) -> Tensor:
        """float32 [B,D] on the CPU, of uint8 [B,3,H,W]."""
        # float32 whatever the network's dtype: moments are sums over tens of thousands of rows.
        if self.scaled_to is not None:
            images = lanczos(images, size=self.scaled_to)
        return self._features(images.to(self.device)).float().cpu()


def lanczos(images: Tensor, *, size: int) -> Tensor:
    """uint8 [B,3,H,H] to uint8 [B,3,size,size] by Pillow's Lanczos kernel, as real images are resized."""
    if images.shape[2:] == (size, size):
        return images
    pixels = [Image.fromarray(image) for image in images.permute(0, 2, 3, 1).cpu().numpy()]
    resized = [np.array(image.resize((size, size), Image.Resampling.LANCZOS)) for image in pixels]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2)


class MetricNetworks(FeatureReader):
    """All networks that score images, on one device."""

    def __init__(self, settings: MetricSettings, *, device: str) -> None:
        super().__init__(settings.features, device=device)
        if settings.scorer.network == "mini":
            self._scorer = load_scorer(WEIGHTS / "scorer")
        else:
            weights = _weights(settings.scorer, bundled="scorer")
            self._scorer = open_clip_scorer(settings.scorer.network, weights=weights)
        self._preferences = {
            one.name: preference_scorer(
                one.name, shape=one.shape, weights=pinned_file(one.weights, sha256=one.sha256)
            )
            for one in settings.preferences
        }
        for scorer in (self._scorer, *self._preferences.values()):
            scorer.model.to(device)

    def clip(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """Cosine of each image, uint8 [B,3,H,W], with its caption: float32 [B] on the CPU."""
        return self._scorer.score(images.to(self.device), captions).cpu()

    def preferences(self, images: Tensor, captions: Sequence[str]) -> dict[str, Tensor]:
        """Each preference score of images, uint8 [B,3,H,W], with their captions: float32 [B] on the CPU."""
        pixels = images.to(self.device)
        return {name: scorer.score(pixels, captions).cpu() for name, scorer in self._preferences.items()}

    def attributes(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """Whether each attribute of an image is as its caption says, uint8 [B,5]; [B,0] without the oracle.

        Raises:
            ValueError: if the oracle cannot read a caption.
        """
        if self._oracle is None:
            return torch.empty(len(images), 0, dtype=torch.uint8)
        expected = scene_labels([parse_caption(caption) for caption in captions])
        return (self._oracle.labels(images.to(self.device)).cpu() == expected).to(torch.uint8)
