"""The safety checker of a diffusers folder: it finds images that should not be shown."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPImageProcessor

from snapfusion.models.errors import ModelError
from snapfusion.models.locate import locate
from snapfusion.models.network_files import read_network
from snapfusion.models.random_weights import RANDOM_PREFIX
from snapfusion.models.source import parse_source
from snapfusion.models.stored import SAFETY_CHECKER, has_safety_checker

# It warns of each image in a wording of its own; whoever calls it reports what it finds.
logging.getLogger(StableDiffusionSafetyChecker.__module__).setLevel(logging.ERROR)
_FEATURE_EXTRACTOR: Final = "feature_extractor"
_HUB_FILES = (
    f"{SAFETY_CHECKER}/*.json",
    f"{SAFETY_CHECKER}/model.safetensors",
    f"{_FEATURE_EXTRACTOR}/*.json",
)


@dataclass(frozen=True, kw_only=True)
class SafetyChecker:
    """Compares images with the concepts of a Stable Diffusion's own safety checker.

    Attributes:
        network: the CLIP image encoder, with the embeddings and the thresholds of the concepts.
        processor: resizes, crops and normalizes images for it.
    """

    network: StableDiffusionSafetyChecker
    processor: Any

    @torch.inference_mode()
    def flags(self, images: Sequence[np.ndarray]) -> list[bool]:
        """Tell of each image, uint8 [H,W,3], whether it should not be shown, as diffusers' pipelines do."""
        pixels = self.processor(list(images), return_tensors="pt").pixel_values
        network: Any = self.network
        _, found = network(
            clip_input=pixels.to(device=network.device, dtype=network.dtype), images=list(images)
        )
        return [bool(flag) for flag in found]


def find_safety_checker(source: str) -> Path | None:
    """Return the local folder of a model's safety checker; None if it has none.

    Args:
        source: as of `snapfusion.models.load.load`. Only diffusers folders have safety checkers.

    Raises:
        ModelError: if there is no such model.
    """
    if source.startswith(RANDOM_PREFIX):
        return None
    model = parse_source(source)
    folder = locate(model.path, revision=model.revision, patterns=_HUB_FILES)
    return folder / SAFETY_CHECKER if has_safety_checker(folder) else None


def read_safety_checker(folder: Path, *, source: str) -> SafetyChecker:
    """Read a safety checker, float32 on the CPU, and the feature extractor beside it.

    Args:
        folder: of the safety checker.
        source: the model, whose variant is read; named in errors.

    Raises:
        ModelError: if it is incomplete or cannot be read.
    """
    variant = parse_source(source).variant
    network = read_network(folder, source=source, variant=variant, cls=StableDiffusionSafetyChecker)
    processor = _processor(folder.with_name(_FEATURE_EXTRACTOR), source=source)
    return SafetyChecker(network=network.float().eval(), processor=processor)


def _processor(folder: Path, *, source: str) -> Any:  # noqa: ANN401 - without types
    try:
        return CLIPImageProcessor.from_pretrained(folder)
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{source}: its {folder.name} cannot be read: {reason}") from None
