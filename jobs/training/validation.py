"""A model looked at while it is trained: the same captions drawn and judged again, the best weights kept.

OUT/watch/step-00000100.png   a row of pictures for each guidance, by the weights after so many steps
OUT/best/                     the weights with the best figure, as a diffusers folder
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from jobs.evaluation.evaluation import captions_of
from jobs.training.settings import ValidationSettings
from jobs.training.spec import TrainingError, ValidationResult
from pipelines.datasets.references import moments_of
from pipelines.sources.captions import Caption
from pipelines.stages.reference import SCENE_PREFIX, ExtractFeatures
from pipelines.stages.sample import SampleAndScore
from pipelines.stages.settings import Device, ImageBounds, MetricSettings, Sampler
from pipelines.tables.table import open_table
from snapfusion.metrics.frechet import frechet_distance
from snapfusion.metrics.moments import Moments
from snapfusion.mini.vocabulary import NUM_CAPTIONS
from snapfusion.models.guidance_embedding import WEIGHT_NAME, with_guidance_embedding
from snapfusion.noise import noise_key
from snapfusion.settings import differences

if TYPE_CHECKING:
    pass


_DEFAULT_STEPS = 50
_NUM_SCENES = 2 * NUM_CAPTIONS
"""As many as `jobs.evaluate` takes: each caption twice."""


class Validator:
    """Looks at weights, on the first worker. It loads its networks at the first look.

    Args:
        settings: how.
        every: steps between looks.
        model: the source of all but the weights that are watched.
        size: of the pictures that are drawn, in pixels, where `settings.drawing` says none.
        steps: the student's, or None where there is none.
        device: the worker's.
        threads: the worker's.
    """

    def __init__(
        self,
        settings: ValidationSettings,
        *,
        every: int,
        model: str,
        size: int,
        steps: int | None,
        device: torch.device,
        threads: int,
    ) -> None:
        self.every = every
        self._settings, self._model = settings, model
        self._drawing = settings.drawing.model_copy(update={"size": settings.drawing.size or size})
        self._sampler = Sampler(steps=settings.steps or steps or _DEFAULT_STEPS)
        self._device = Device(
            kind="cuda" if device.type == "cuda" else "cpu", dtype=settings.dtype, threads=threads
        )
        self._artist: SampleAndScore | None = None
        self._reference: Moments | None = None

    def __call__(self, weights: Mapping[str, Tensor]) -> ValidationResult:
        """What weights of a v model are worth; the same for the same weights."""
        artist = self._load(weights)
        captions = [row for row in captions_of(self._settings.prompts) if isinstance(row, Caption)]
        drawn = [self._draw(artist, captions, w=w) for w in self._settings.guidance]
        points = [point for point, _ in drawn]
        first, criterion = points[0], self._settings.best
        decisive = first[criterion]
        return ValidationResult(
            values={"points": points},
            figures={
                f"watch/w{point['w']:g}/{name}": value
                for point in points
                for name, value in point.items()
                if name != "w" and value is not None
            },
            score=-decisive if criterion == "clip" and decisive is not None else decisive,
            picture=np.concatenate([row for _, row in drawn]),
        )

    def _load(self, weights: Mapping[str, Tensor]) -> SampleAndScore:
        if self._artist is None:
            self._artist = SampleAndScore(
                model=self._model,
                sampler=self._sampler,
                drawing=self._drawing,
                judging=self._settings.judging,
                device=self._device,
            )
            self._artist.bundle.prediction_type = "v_prediction"
            if WEIGHT_NAME in weights:
                self._artist.bundle.unet = with_guidance_embedding(self._artist.bundle.unet)
        self._artist.bundle.unet.load_state_dict(weights)
        return self._artist

    def _draw(
        self, artist: SampleAndScore, captions: list[Caption], *, w: float
    ) -> tuple[dict[str, Any], np.ndarray]:
        """The figures at a guidance; and the first pictures side by side, uint8 [H,W,3]."""
        drawing, size = self._drawing, self._drawing.batch_size
        keys = [noise_key("evaluation", drawing.seed, caption.id) for caption in captions]
        texts = [caption.text for caption in captions]
        spans = [slice(start, start + size) for start in range(0, len(keys), size)]
        batches = [artist.draw_and_judge(texts[span], keys[span], w=w) for span in spans]
        columns = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
        row = np.concatenate(list(columns["image"][: self._settings.pictures]), axis=1)
        finite = columns["finite"]
        point: dict[str, Any] = {"w": w, "pictures": int(finite.sum()), "fid": None, "clip": None}
        if finite.sum() < 2:
            return point, row
        moments = Moments.of(torch.from_numpy(columns["features"][finite]))
        point["fid"] = frechet_distance(moments, self._references())
        point["clip"] = float(columns["clip"][finite].mean(dtype=np.float64))
        if self._settings.judging.attribute_count:
            point["attributes"] = float(columns["right"][finite].mean(dtype=np.float64))
        return point, row

    def _references(self) -> Moments:
        if self._reference is None:
            url, judging = self._settings.references, self._settings.judging
            self._reference = (
                moments_of(open_table(url, kind="references"))
                if url
                else _scene_moments(judging, self._device)
            )
        return self._reference


def _scene_moments(judging: MetricSettings, device: Device) -> Moments:
    describe = ExtractFeatures(features=judging.features, images=ImageBounds(), size=1, device=device)
    pictures = [describe.picture(f"{SCENE_PREFIX}{number}") for number in range(_NUM_SCENES)]
    return Moments.of(torch.from_numpy(describe.describe(pictures)))


def check_validation(settings: ValidationSettings, *, size: int) -> None:
    """Refuse what could not be measured of pictures of `size` pixels, before training begins.

    Raises:
        TrainingError: if the judges cannot read the model's pictures, or the table of references has other
            features than theirs; names what differs.
        TableError: if there is no such table.
    """
    if settings.every is None:
        return
    judging = settings.judging
    size = settings.drawing.size or size
    if judging.side not in (None, size):
        raise TrainingError(
            f"the miniature's oracle reads pictures of {judging.side} px, and the model draws {size} px: "
            "set watch.judging, or watch.every=null"
        )
    if settings.references is None:
        return
    there = open_table(settings.references, kind="references").identity["features"]
    differing = list(differences(there, judging.describe_features()))
    if differing:
        raise TrainingError(
            f"watch.references {settings.references} has other features than watch.judging: "
            f"{'; '.join(differing[:3])}"
        )
