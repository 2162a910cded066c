"""Validation during training: the same captions sampled and scored again, the best weights kept.

OUT/watch/step-00000100.png   a row of images for each guidance scale, by the weights after so many steps
OUT/best/                     the weights with the best score, as a diffusers folder
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from jobs.evaluation.captions import captions_of
from jobs.training.settings import ValidationSettings
from jobs.training.spec import TrainingError, ValidationResult, first_differences
from pipelines.datasets.references import moments_of
from pipelines.sources.captions import Caption
from pipelines.stages.metric_networks import describe_features
from pipelines.stages.reference import SCENE_PREFIX, ExtractFeatures
from pipelines.stages.sample import SampleAndScore
from pipelines.stages.settings import Device, ImageBounds, Sampler
from pipelines.tables.table import open_table
from snapfusion.metrics.frechet import frechet_distance
from snapfusion.metrics.moments import Moments
from snapfusion.mini.vocabulary import NUM_CAPTIONS
from snapfusion.models.bundle import Bundle
from snapfusion.models.guidance_embedding import WEIGHT_NAME, with_guidance_embedding
from snapfusion.models.load import load_network
from snapfusion.models.lora import merge_matrices
from snapfusion.models.lora_files import LoraWeights
from snapfusion.noise import noise_key
from snapfusion.training.lora import is_lora_state, lora_weights

_DEFAULT_STEPS = 50
_NUM_SCENES = 2 * NUM_CAPTIONS
"""As many as `jobs.evaluate` takes: each caption twice."""


@dataclass(kw_only=True)
class Validator:
    """Validates weights on rank 0. Loads its networks at the first call.

    Attributes:
        settings: of the validation.
        every: steps between validations.
        model: source of all but the weights that are validated.
        size: of the images in pixels, unless the settings give one.
        distillation: what the student's folder records of its distillation; None if it is not distilled.
        device: of the worker.
        threads: of the worker.
    """

    settings: ValidationSettings
    every: int
    model: str
    size: int
    distillation: Mapping[str, Any] | None
    device: torch.device
    threads: int

    def __call__(self, weights: Mapping[str, Tensor]) -> ValidationResult:
        """Validate weights of a v model; the same weights have the same result."""
        load_weights(self._networks.bundle, weights)
        captions = [row for row in captions_of(self.settings.prompts) if isinstance(row, Caption)]
        results = [self._score(captions, w=w) for w in self.settings.guidance]
        points = [point for point, _ in results]
        score = points[0][self.settings.best]
        return ValidationResult(
            record={"points": points},
            scalars={
                f"watch/w{point['w']:g}/{name}": value
                for point in points
                for name, value in point.items()
                if name != "w" and value is not None
            },
            score=-score if self.settings.best == "clip" and score is not None else score,
            image=np.concatenate([row for _, row in results]),
        )

    @cached_property
    def _device(self) -> Device:
        kind: Literal["cuda", "cpu"] = "cuda" if self.device.type == "cuda" else "cpu"
        return Device(kind=kind, dtype=self.settings.dtype, threads=self.threads)

    @property
    def _sampler(self) -> Sampler:
        """Of the student; DDIM of so many steps for a model that is not distilled."""
        record = self.distillation or {"steps": _DEFAULT_STEPS}
        return Sampler(solver=record.get("sampler", "ddim"), steps=self.settings.steps or record["steps"])

    @cached_property
    def _networks(self) -> SampleAndScore:
        sampling = self.settings.drawing
        networks = SampleAndScore(
            model=self.model,
            sampler=self._sampler,
            distillation=self.distillation,
            sampling=sampling.model_copy(update={"size": sampling.size or self.size}),
            metrics=self.settings.judging,
            device=self._device,
        )
        # The source may be an eps model whose UNet is being fine-tuned to v.
        networks.bundle.prediction_type = "v_prediction"
        return networks

    @cached_property
    def _references(self) -> Moments:
        """Feature moments of the reference images."""
        settings = self.settings
        if settings.references is not None:
            return moments_of(open_table(settings.references, kind="references"))
        extract = ExtractFeatures(
            features=settings.judging.features, images=ImageBounds(), size=1, device=self._device
        )
        scenes = [extract.read_image(f"{SCENE_PREFIX}{index}") for index in range(_NUM_SCENES)]
        return Moments.of(torch.from_numpy(extract.extract(scenes)))

    def _score(self, captions: Sequence[Caption], *, w: float) -> tuple[dict[str, Any], np.ndarray]:
        """The metrics at a guidance scale, and the first images side by side, uint8 [H,W,3]."""
        sampling, size = self.settings.drawing, self.settings.drawing.batch_size
        keys = [noise_key("evaluation", sampling.seed, caption.id) for caption in captions]
        texts = [caption.text for caption in captions]
        spans = [slice(start, start + size) for start in range(0, len(keys), size)]
        batches = [self._networks.sample_and_score(texts[span], keys[span], w=w) for span in spans]
        columns = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
        row = np.concatenate(list(columns["image"][: self.settings.images]), axis=1)
        finite = columns["finite"]
        point: dict[str, Any] = {"w": w, "pictures": int(finite.sum()), "fid": None, "clip": None}
        # A covariance needs two images; a diverged student may have none that is finite.
        if finite.sum() < 2:
            return point, row
        moments = Moments.of(torch.from_numpy(columns["features"][finite]))
        point["fid"] = frechet_distance(moments, self._references)
        point["clip"] = float(columns["clip"][finite].mean(dtype=np.float64))
        if self.settings.judging.attribute_count:
            point["attributes"] = float(columns["right"][finite].mean(dtype=np.float64))
        return point, row


def load_weights(bundle: Bundle, weights: Mapping[str, Tensor]) -> None:
    """Give a bundle's UNet these weights, or merge an adapter into it as its source has it.

    The weights may be of a UNet with a guidance input that the bundle's lacks.
    """
    if is_lora_state(weights):
        _merge_adapter(bundle, lora_weights(weights))
        return
    if WEIGHT_NAME in weights:
        bundle.unet = with_guidance_embedding(bundle.unet)
    bundle.unet.load_state_dict(weights)


def _merge_adapter(bundle: Bundle, lora: LoraWeights) -> None:
    # Read anew: another adapter may have been merged into the present one.
    unet: Any = load_network(bundle.source, part="unet")
    size = bundle.image_size
    merge_matrices(unet, lora)
    bundle.unet = unet.to(bundle.device, bundle.unet.dtype)
    bundle.resize(size)


def check_validation(settings: ValidationSettings, *, size: int) -> None:
    """Refuse a validation that is not possible for images of `size` pixels, before training begins.

    Raises:
        TrainingError: if the metric networks cannot read images of that size, or the references have features
            of another network; names what differs.
        TableError: if there is no table of references.
    """
    if settings.every is None:
        return
    size = settings.drawing.size or size
    if settings.judging.side not in (None, size):
        raise TrainingError(
            f"the miniature's oracle reads images of {settings.judging.side} px, and the model generates "
            f"{size} px: set validation.judging, or validation.every=null"
        )
    if settings.references is None:
        return
    features = open_table(settings.references, kind="references").identity["features"]
    if differing := first_differences(features, describe_features(settings.judging.features)):
        raise TrainingError(
            f"validation.references {settings.references} has other features than validation.judging: "
            f"{differing}"
        )
