"""Losses of a miniature without a group of its blocks, for plain and for robust training. SnapFusion Fig. 5.

Two metrics separate the uses of blocks as in Sec. 5.2: whether an image shows what its caption says
(attributes), and whether details that noise has hidden are restored (detail).

Each seed has its own scenes and noise. They are the same for both models and for every group, so losses are
paired, and all intervals are jackknives that leave out one batch of scenes at a time from everything that is
compared.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from statistics import fmean
from typing import Literal, get_args

import torch
from torch import Tensor

from snapfusion.metrics import intervals
from snapfusion.metrics.intervals import Interval
from snapfusion.mini.measure import SamplerConfig, generate_images, held_out_batches, image_psnr
from snapfusion.mini.oracle import Oracle
from snapfusion.mini.scenes import caption_of, image_batch, scene_of
from snapfusion.mini.settings import ROBUSTNESS_BATCH, RobustnessSettings
from snapfusion.mini.vocabulary import IMAGE_SIZE
from snapfusion.models.blocks import blocks_of, skipping_blocks
from snapfusion.models.bundle import Bundle, to_uint8
from snapfusion.noise import gaussian_batch, noise_key
from snapfusion.sampling import sample, time_grid

WHOLE = "whole"
"""The empty group of blocks: the whole model."""

Metric = Literal["attributes", "detail"]
METRIC_NAMES: tuple[Metric, ...] = get_args(Metric)
PartMetrics = dict[Metric, tuple[float, ...]]
"""The mean of each batch of scenes: the proportion of correct attributes, and the PSNR in dB of details."""

_MODELS = ("plain", "robust")
_SIDES = {"down_blocks": "down", "mid_block": "middle", "up_blocks": "up"}


class RobustnessError(ValueError):
    """Models that cannot be measured or compared; says which and why."""


@dataclass(frozen=True, kw_only=True)
class RobustnessPart:
    """A unit of the measurement.

    Attributes:
        model: its name, "plain" or "robust".
        seed: of the evaluation.
        group: of blocks that the model is without.
    """

    model: str
    seed: int
    group: str

    def __str__(self) -> str:
        return f"{self.model} {self.seed} {self.group}"


@dataclass(frozen=True, kw_only=True)
class NoisedBatch:
    """A batch of held-out scenes with noise.

    Attributes:
        indexes: of the scenes.
        decoded: their images as the VAE decodes them from their latents, uint8 [B,3,32,32].
        z_t: their latents with noise, float32 [B,4,8,8].
    """

    indexes: Sequence[int]
    decoded: Tensor
    z_t: Tensor

    @property
    def captions(self) -> list[str]:
        """Of the scenes."""
        return [caption_of(scene_of(index)) for index in self.indexes]


@dataclass(frozen=True, kw_only=True)
class LossComparison:
    """Loss of either model without blocks, in the metric's unit.

    Attributes:
        plain: whole minus without, of the model with plain training.
        robust: likewise, with robust training.
        ratio: robust / plain; None where plain's loss does not differ from zero within its interval.
    """

    plain: Interval
    robust: Interval
    ratio: Interval | None

    @classmethod
    def of(cls, losses: Sequence[Sequence[float]]) -> LossComparison:
        """From the losses of the batches of plain, and of robust."""
        plain, robust = (intervals.jackknife(each, fmean) for each in losses)
        pairs = list(zip(*losses, strict=True))
        ratio = intervals.jackknife(pairs, _ratio) if plain.low > 0 else None
        return cls(plain=plain, robust=robust, ratio=ratio)


def _ratio(pairs: Sequence[tuple[float, ...]]) -> float:
    plain, robust = zip(*pairs, strict=True)
    return fmean(robust) / fmean(plain)


def groups_of(model: Bundle) -> dict[str, tuple[str, ...]]:
    """Names of blocks by kind and part of the UNet, "attention down" to "resnet up"; no empty groups."""
    groups: dict[str, list[str]] = {
        f"{kind} {side}": [] for kind in ("attention", "resnet") for side in _SIDES.values()
    }
    for block in blocks_of(model.unet):
        groups[f"{block.kind} {_SIDES[block.stage.partition('.')[0]]}"].append(block.name)
    return {group: tuple(names) for group, names in groups.items() if names}


def check_comparable(models: Mapping[str, Bundle]) -> None:
    """Check that the models are miniatures that differ in their UNets' weights only.

    Raises:
        RobustnessError: naming what differs.
    """
    for name, model in models.items():
        if model.image_size != IMAGE_SIZE:
            raise RobustnessError(
                f"{name}: {model.source} generates images of {model.image_size} px; the oracle reads a "
                f"miniature's, of {IMAGE_SIZE}"
            )
    blocks = {name: {block.name for block in blocks_of(model.unet)} for name, model in models.items()}
    for name, other in permutations(models, 2):
        if missing := sorted(blocks[name] - blocks[other]):
            raise RobustnessError(
                f"{name} has the block {missing[0]}, {other} has not ({len(missing)} such); models of the "
                "same blocks are accepted"
            )
        for part in ("vae", "text_encoder"):
            if models[name].fingerprint()[part] != models[other].fingerprint()[part]:
                raise RobustnessError(
                    f"{name} and {other} have different weights in {part}, so their losses would not be "
                    "due to their UNets alone; give two trainings of one model"
                )


def robustness_parts(settings: RobustnessSettings, models: Mapping[str, Bundle]) -> list[RobustnessPart]:
    """All parts in their order: seed by seed, model by model, the whole model first."""
    return [
        RobustnessPart(model=name, seed=seed, group=group)
        for seed in settings.seeds
        for name, model in models.items()
        for group in (WHOLE, *groups_of(model))
    ]


def measure_robustness(
    settings: RobustnessSettings,
    *,
    models: Mapping[str, Bundle],
    oracle: Oracle,
    on_result: Callable[[RobustnessPart, PartMetrics], None],
    known: Collection[str] = (),
) -> None:
    """Measure every part except those named in `known`; `on_result` is called with each as it is ready.

    Raises:
        RobustnessError: if the models cannot be compared, or a network's output is not finite.
    """
    check_comparable(models)
    parts = [part for part in robustness_parts(settings, models) if str(part) not in known]
    for seed in settings.seeds:
        of_seed = [part for part in parts if part.seed == seed]
        # All models have the same VAE and text encoder, so any of them makes the batches.
        batches = list(noised_batches(next(iter(models.values())), settings, seed=seed)) if of_seed else []
        for part in of_seed:
            model = models[part.model]
            on_result(part, _measure_part(model, part, batches=batches, settings=settings, oracle=oracle))


@torch.inference_mode()
def noised_batches(
    model: Bundle, settings: RobustnessSettings, *, seed: int, count: int | None = None
) -> Iterator[NoisedBatch]:
    """The scenes of a seed batch by batch, or the first `count` of them; noise depends on seed and scene."""
    first = seed * settings.scenes
    for indexes in held_out_batches(count or settings.scenes, batch=ROBUSTNESS_BATCH, first=first):
        x = model.encode_images(image_batch(indexes))
        eps = gaussian_batch([noise_key("robustness", seed, index) for index in indexes], model.latent_shape)
        z_t = model.schedule.diffuse(x=x, eps=eps, t=torch.full((len(indexes),), settings.noised_to))
        yield NoisedBatch(indexes=indexes, decoded=to_uint8(model.decode(x)), z_t=z_t)


def denoising_times(noised_to: int, *, steps: int, schedule_steps: int) -> tuple[int, ...]:
    """The times from t = `noised_to` to the clean image: t itself, then the points of the grid below it.

    Images are thus denoised at the same times at which they are sampled. Where t is on the grid, as 249 is
    for 8 and 16 steps, these are the last times of sampling; elsewhere the first step is a shorter one.
    """
    grid = time_grid(steps, schedule_steps=schedule_steps)
    return (noised_to, *(t for t in grid if t < noised_to))


@torch.inference_mode()
def denoise(model: Bundle, batch: NoisedBatch, *, settings: RobustnessSettings) -> Tensor:
    """The images uint8 [B,3,32,32] that DDIM computes from z_t and the captions, without guidance.

    Raises:
        RobustnessError: if the network's output is not finite.
    """
    grid = denoising_times(settings.noised_to, steps=settings.steps, schedule_steps=model.schedule.num_steps)
    denoiser = model.denoiser(model.encode_text(model.tokenize(batch.captions)))
    latents = sample(denoiser, batch.z_t, grid=grid, schedule=model.schedule)
    if not latents.isfinite().all():
        raise RobustnessError(f"{model.source} gives latents that are not finite; check its weights")
    return to_uint8(model.decode(latents))


def sampler_of(settings: RobustnessSettings) -> SamplerConfig:
    """The sampler of images that are generated from noise."""
    return SamplerConfig(solver="ddim", steps=settings.steps, w=settings.guidance)


def _measure_part(
    model: Bundle,
    part: RobustnessPart,
    *,
    batches: Sequence[NoisedBatch],
    settings: RobustnessSettings,
    oracle: Oracle,
) -> PartMetrics:
    attributes, detail = [], []
    with skipping_blocks(model.unet, groups_of(model).get(part.group, ())):
        for batch in batches:
            psnrs = image_psnr(denoise(model, batch, settings=settings), batch.decoded)
            images = generate_images(model, batch.indexes, sampler=sampler_of(settings), seed=part.seed)
            right = oracle.score(images, [scene_of(index) for index in batch.indexes])
            detail.append(float(psnrs.double().mean()))
            attributes.append(float(right.double().mean()))
    if torch.tensor(detail).isinf().any():
        raise RobustnessError(f"{part}: an image is restored exactly; give a later noised_to")
    return {"attributes": tuple(attributes), "detail": tuple(detail)}


@dataclass(frozen=True, kw_only=True)
class RobustnessResults:
    """The metrics of all parts, with comparisons of the two models.

    Attributes:
        of: by the name of each part.
        groups: names of the groups of blocks.
        seeds: of the evaluation.
    """

    of: Mapping[str, PartMetrics]
    groups: tuple[str, ...]
    seeds: tuple[int, ...]

    def value(self, metric: Metric, *, model: str, group: str) -> Interval:
        """The metric without a group, over all seeds."""
        return intervals.jackknife(self._batches(metric, model, group, self.seeds), fmean)

    def lost(self, metric: Metric, *, group: str) -> LossComparison:
        """The losses without one group, over all seeds."""
        return LossComparison.of([self._losses(metric, model, group, self.seeds) for model in _MODELS])

    def lost_on_average(self, metric: Metric, *, seeds: Sequence[int] | None = None) -> LossComparison:
        """The mean over groups of the losses without each; over the given seeds, or all."""
        return LossComparison.of([self._mean_losses(metric, model, seeds or self.seeds) for model in _MODELS])

    def below_plain(self, metric: Metric) -> LossComparison:
        """As `lost_on_average` over all seeds, but both relative to the whole plain model.

        Thus what robust training itself costs the whole model counts as a loss.
        """
        plain, robust = (self._batches(metric, model, WHOLE, self.seeds) for model in _MODELS)
        plain_losses, robust_losses = (self._mean_losses(metric, model, self.seeds) for model in _MODELS)
        costs = zip(robust_losses, plain, robust, strict=True)
        return LossComparison.of([plain_losses, [lost + (before - after) for lost, before, after in costs]])

    def _mean_losses(self, metric: Metric, model: str, seeds: Sequence[int]) -> list[float]:
        by_group = [self._losses(metric, model, group, seeds) for group in self.groups]
        return [fmean(losses) for losses in zip(*by_group, strict=True)]

    def _losses(self, metric: Metric, model: str, group: str, seeds: Sequence[int]) -> list[float]:
        whole, without_group = (self._batches(metric, model, name, seeds) for name in (WHOLE, group))
        return [before - after for before, after in zip(whole, without_group, strict=True)]

    def _batches(self, metric: Metric, model: str, group: str, seeds: Sequence[int]) -> list[float]:
        parts = [RobustnessPart(model=model, seed=seed, group=group) for seed in seeds]
        return [mean for part in parts for mean in self.of[str(part)][metric]]
