"""What a miniature loses without a group of its blocks, trained plainly and robustly. SnapFusion Fig. 5.

Two things are told apart, as Sec. 5.2 does of what blocks are for: whether a picture shows what its caption
says (attributes), and whether details come back that noise has hidden (detail).

A seed has scenes and noise of its own. They are the same for both models and for every group, so losses are
paired, and all intervals leave out one batch of scenes at a time, from all that is compared.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal, get_args

import torch
from torch import Tensor

from snapfusion.metrics import intervals
from snapfusion.metrics.intervals import Interval
from snapfusion.mini.measure import SamplerConfig, generate_images, held_out_batches, image_psnr
from snapfusion.mini.oracle import Oracle
from snapfusion.mini.scenes import caption_of, image_batch, scene_of
from snapfusion.mini.settings import BATCH, RobustnessSettings
from snapfusion.mini.vocabulary import IMAGE_SIZE
from snapfusion.models.architecture import Block
from snapfusion.models.blocks import blocks_of, skipping_blocks
from snapfusion.models.bundle import Bundle, to_uint8
from snapfusion.noise import gaussian_batch, noise_key
from snapfusion.sampling import sample, time_grid

WHOLE = "whole"
"""The group of no blocks."""

Metric = Literal["attributes", "detail"]
METRIC_NAMES: tuple[Metric, ...] = get_args(Metric)
PartMetrics = dict[Metric, tuple[float, ...]]
"""The mean of each batch of scenes: of attributes the share that is right, of details PSNR in dB."""

_SIDES = {"down_blocks": "down", "mid_block": "middle", "up_blocks": "up"}


class RobustnessError(ValueError):
    """Models that cannot be held against each other, or measured at all; says which and why."""


@dataclass(frozen=True, kw_only=True)
class RobustnessPart:
    """What is measured at once.

    Attributes:
        model: its name, "plain" or "robust".
        seed: of the evaluation.
        group: of blocks, which the model is without.
    """

    model: str
    seed: int
    group: str

    def __str__(self) -> str:
        return f"{self.model} {self.seed} {self.group}"


@dataclass(frozen=True, kw_only=True)
class NoisedBatch:
    """A batch of held-out scenes, and what is left of their pictures at t.

    Attributes:
        indexes: of the scenes.
        decoded: their pictures as the VAE decodes them from their latents, uint8 [B,3,32,32].
        z_t: their latents with noise, float32 [B,4,8,8].
    """

    indexes: range
    decoded: Tensor
    z_t: Tensor


@dataclass(frozen=True, kw_only=True)
class LossComparison:
    """What is lost without blocks by one model and by the other, in the figure's own unit.

    Attributes:
        plain: whole minus without, of the model that was trained plainly.
        robust: the same of the other.
        ratio: robust / plain; None where what plain loses is within its interval of nothing.
    """

    plain: Interval
    robust: Interval
    ratio: Interval | None


def groups_of(model: Bundle) -> dict[str, tuple[str, ...]]:
    """The names of blocks by kind and part: "attention down" to "resnet up", without those that are empty."""
    groups: dict[str, list[str]] = {
        f"{kind} {side}": [] for kind in ("attention", "resnet") for side in _SIDES.values()
    }
    for block in blocks_of(model.unet):
        groups[_group(block)].append(block.name)
    return {group: tuple(names) for group, names in groups.items() if names}


def _group(block: Block) -> str:
    return f"{block.kind} {_SIDES[block.stage.partition('.')[0]]}"


def check_comparable(models: Mapping[str, Bundle]) -> None:
    """Make sure that the models are miniatures and differ in their UNets' weights alone.

    Raises:
        RobustnessError: if not; names what differs.
    """
    (name, first), *others = models.items()
    for own, model in models.items():
        if model.image_size != IMAGE_SIZE:
            raise RobustnessError(
                f"{own}: {model.source} draws pictures of {model.image_size} px; the oracle reads a "
                f"miniature's, of {IMAGE_SIZE}"
            )
    for other, model in others:
        _check_blocks(first, model, names=(name, other))
        for part in ("vae", "text_encoder"):
            if first.fingerprint()[part] != model.fingerprint()[part]:
                raise RobustnessError(
                    f"{name} and {other} have different weights in {part}: what they lose would not be their "
                    "UNets' alone; give two trainings from one model"
                )


def _check_blocks(first: Bundle, other: Bundle, *, names: tuple[str, str]) -> None:
    blocks = [{block.name for block in blocks_of(model.unet)} for model in (first, other)]
    for own, lacking, more, less in zip(names, names[::-1], blocks, blocks[::-1], strict=True):
        if missing := sorted(more - less):
            raise RobustnessError(
                f"{own} has the block {missing[0]}, {lacking} has not ({len(missing)} such); models of the "
                "same blocks are accepted"
            )


def robustness_parts(settings: RobustnessSettings, models: Mapping[str, Bundle]) -> list[RobustnessPart]:
    """All parts in their order: seed by seed, model by model, the whole one first."""
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
    gather: Callable[[RobustnessPart, PartMetrics], None],
    known: Collection[str] = (),
) -> None:
    """Measure every part but those whose names are `known`; `gather` is told of each when it is ready.

    Raises:
        RobustnessError: if the models cannot be compared, or one gives what is no number.
    """
    check_comparable(models)
    parts = [part for part in robustness_parts(settings, models) if str(part) not in known]
    for seed in settings.seeds:
        of_seed = [part for part in parts if part.seed == seed]
        # The VAE and the text encoder of all are the same.
        batches = list(noised_batches(next(iter(models.values())), settings, seed=seed)) if of_seed else []
        for part in of_seed:
            gather(
                part,
                _measure_part(models[part.model], part, batches=batches, settings=settings, oracle=oracle),
            )


@torch.inference_mode()
def noised_batches(
    model: Bundle, settings: RobustnessSettings, *, seed: int, count: int | None = None
) -> Iterator[NoisedBatch]:
    """The scenes of a seed, batch by batch, or the first `count` of them; their noise follows from both."""
    for indexes in held_out_batches(count or settings.scenes, batch=BATCH, first=seed * settings.scenes):
        x = model.encode_images(image_batch(indexes))
        eps = gaussian_batch([noise_key("robustness", seed, index) for index in indexes], model.latent_shape)
        t = torch.full((len(indexes),), settings.noised_to)
        yield NoisedBatch(
            indexes=indexes,
            decoded=to_uint8(model.decode(x)),
            z_t=model.schedule.diffuse(x=x, eps=eps, t=t),
        )


def denoising_times(noised_to: int, *, steps: int, schedule_steps: int) -> tuple[int, ...]:
    """The times on the way back from t: t itself, and then all points of the grid of `steps` below it.

    So pictures come back by the same landings by which they are drawn. Where t is on the grid, as 249 is for
    8 and 16 steps, the way is the end of a drawing's; elsewhere its first step is a shorter one.
    """
    grid = time_grid(steps, schedule_steps=schedule_steps)
    return (noised_to, *(t for t in grid if t < noised_to))


@torch.inference_mode()
def denoise(model: Bundle, scenes: NoisedBatch, *, settings: RobustnessSettings) -> Tensor:
    """The pictures uint8 [B,3,32,32] that DDIM finds from z_t, told the caption, without guidance.

    Raises:
        RobustnessError: if the network gives what is no number.
    """
    captions = [caption_of(scene_of(index)) for index in scenes.indexes]
    grid = denoising_times(settings.noised_to, steps=settings.steps, schedule_steps=model.schedule.num_steps)
    denoiser = model.denoiser(model.encode_text(model.tokenize(captions)))
    latents = sample(denoiser, scenes.z_t, grid=grid, schedule=model.schedule)
    if not latents.isfinite().all():
        raise RobustnessError(f"{model.source} gives latents that are no numbers; its weights are of no use")
    return to_uint8(model.decode(latents))


def sampler_of(settings: RobustnessSettings) -> SamplerConfig:
    """How pictures are drawn."""
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
            drawn = generate_images(model, batch.indexes, drawing=sampler_of(settings), seed=part.seed)
            right = oracle.score(drawn, [scene_of(index) for index in batch.indexes])
            detail.append(float(psnrs.double().mean()))
            attributes.append(float(right.double().mean()))
    if torch.tensor(detail).isinf().any():
        raise RobustnessError(
            f"{part}: a picture comes back to the bit from noised_to={settings.noised_to}; give a later time"
        )
    return {"attributes": tuple(attributes), "detail": tuple(detail)}


@dataclass(frozen=True)
class RobustnessResults:
    """All readings, and what they say.

    Attributes:
        of: by the name of each part.
        groups: names of the groups of blocks.
        seeds: of the evaluation.
    """

    of: Mapping[str, PartMetrics]
    groups: tuple[str, ...]
    seeds: tuple[int, ...]

    def value(self, figure: Metric, *, model: str, group: str) -> Interval:
        """The figure without a group, over all seeds."""
        return intervals.jackknife(self._batches(figure, model, group, self.seeds), fmean)

    def lost(self, figure: Metric, *, group: str) -> LossComparison:
        """What is lost without one group, over all seeds."""
        return _compare(*(self._losses(figure, model, group, self.seeds) for model in ("plain", "robust")))

    def lost_on_average(self, figure: Metric, *, seeds: Sequence[int] | None = None) -> LossComparison:
        """The mean over groups of what is lost without each; over the seeds given, or all."""
        return _compare(
            *(self._mean_losses(figure, model, seeds or self.seeds) for model in ("plain", "robust"))
        )

    def below_plain(self, figure: Metric) -> LossComparison:
        """The same over all seeds, but counted from the plain model's whole for both.

        So what robust training itself takes from the whole model is held against it.
        """
        plain, own = (self._batches(figure, model, WHOLE, self.seeds) for model in ("plain", "robust"))
        taken = [before - after for before, after in zip(plain, own, strict=True)]
        losses = self._mean_losses(figure, "robust", self.seeds)
        return _compare(
            self._mean_losses(figure, "plain", self.seeds),
            [lost + extra for lost, extra in zip(losses, taken, strict=True)],
        )

    def _mean_losses(self, figure: Metric, model: str, seeds: Sequence[int]) -> list[float]:
        by_group = [self._losses(figure, model, group, seeds) for group in self.groups]
        return [fmean(losses) for losses in zip(*by_group, strict=True)]

    def _losses(self, figure: Metric, model: str, group: str, seeds: Sequence[int]) -> list[float]:
        whole, left = (self._batches(figure, model, name, seeds) for name in (WHOLE, group))
        return [before - after for before, after in zip(whole, left, strict=True)]

    def _batches(self, figure: Metric, model: str, group: str, seeds: Sequence[int]) -> list[float]:
        parts = [RobustnessPart(model=model, seed=seed, group=group) for seed in seeds]
        return [mean for part in parts for mean in self.of[str(part)][figure]]


def _compare(plain: Sequence[float], robust: Sequence[float]) -> LossComparison:
    lost = intervals.jackknife(plain, fmean)
    pairs = list(zip(plain, robust, strict=True))
    return LossComparison(
        plain=lost,
        robust=intervals.jackknife(robust, fmean),
        ratio=intervals.jackknife(pairs, _ratio) if lost.low > 0 else None,
    )


def _ratio(pairs: Sequence[tuple[float, float]]) -> float:
    plain, robust = zip(*pairs, strict=True)
    return fmean(robust) / fmean(plain)
