"""Metrics of a miniature on held-out scenes, with 95 % intervals."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property, partial, reduce
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from snapfusion.losses import velocity_loss
from snapfusion.metrics import intervals
from snapfusion.metrics.clip import ClipScorer, load_scorer
from snapfusion.metrics.frechet import frechet_distance
from snapfusion.metrics.intervals import Interval
from snapfusion.metrics.moments import Moments
from snapfusion.mini.oracle import Oracle, load_oracle
from snapfusion.mini.scenes import (
    HELD_OUT,
    caption_of,
    change_one_attribute,
    held_out_index,
    image_batch,
    scene_of,
)
from snapfusion.mini.settings import BATCH, MiniMeasurementSettings
from snapfusion.mini.split import Split
from snapfusion.mini.vocabulary import NUM_CAPTIONS, STORED_NAMES
from snapfusion.mini.weights import WEIGHTS
from snapfusion.models.blocks import skipping_blocks
from snapfusion.models.bundle import Bundle, to_uint8
from snapfusion.models.cost import paper_stages
from snapfusion.models.load import load
from snapfusion.models.unet import architecture_of
from snapfusion.noise import gaussian_batch, noise_key, step_noise, uniform
from snapfusion.sampling import sample, time_grid
from snapfusion.solver_names import Solver

_OTHER_RENDERING_OFFSET = 10_000 * NUM_CAPTIONS
"""From a held-out index to another rendering of the same caption."""

MetricIntervals = dict[str, Interval]
Batches = Sequence[Sequence[int]]
"""Indexes of scenes, batch by batch."""
ResultCallback = Callable[[str, MetricIntervals], None]
"""Called with a part's name and metrics as they are ready."""


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """Networks that evaluate images of held-out scenes.

    Attributes:
        scorer: computes the CLIP score.
        oracle: reads attributes; its features are those of the Frechet distance.
        batches: indexes of the held-out scenes.
    """

    scorer: ClipScorer
    oracle: Oracle
    batches: Batches

    @cached_property
    def reference(self) -> tuple[Moments, ...]:
        """Moments of the held-out scenes' own images, batch by batch."""
        return tuple(self.moments(image_batch(indexes)) for indexes in self.batches)

    @torch.inference_mode()
    def moments(self, images: Tensor) -> Moments:
        """Of the oracle's features of uint8 [B,3,32,32]."""
        return Moments.of(self.oracle.features(images))

    def distance(self, batches: Sequence[Moments]) -> Interval:
        """Frechet distance to `reference`, whose batches have the same captions."""

        def distance(pairs: Sequence[tuple[Moments, Moments]]) -> float:
            generated, real = (reduce(Moments.merge, side) for side in zip(*pairs, strict=True))
            return frechet_distance(generated, real)

        return intervals.jackknife(list(zip(batches, self.reference, strict=True)), distance)


def measure_mini(
    settings: MiniMeasurementSettings,
    *,
    folder: Path = WEIGHTS,
    on_result: ResultCallback,
    known: Collection[str] = (),
) -> None:
    """Compute all metrics of the weights in `folder`, part by part, except the parts in `known`."""
    scorer, oracle = load_scorer(folder / "scorer"), load_oracle(folder / "oracle")
    batches = held_out_batches(settings.scenes, split=settings.split)
    evaluator = Evaluator(scorer=scorer, oracle=oracle, batches=batches)
    vae = load(str(folder / "sd"))
    parts: dict[str, Callable[[], MetricIntervals]] = {
        "vae": lambda: measure_vae(vae, batches),
        "scorer": lambda: measure_scorer(scorer, batches),
        "oracle": lambda: measure_oracle(oracle, batches),
        "floor": lambda: measure_floor(vae, evaluator=evaluator),
    }
    for name in settings.models:
        model = load(str(folder / name))
        parts[f"{name} blocks"] = partial(measure_blocks, model, batches, seed=settings.seed)
        for solver, steps, w in product(settings.solvers, settings.steps, settings.guidance):
            sampler = SamplerConfig(solver=solver, steps=steps, w=w)
            parts[f"{name} {sampler}"] = partial(
                measure_samples, model, sampler, evaluator=evaluator, seed=settings.seed
            )
    for name, part in parts.items():
        if name not in known:
            on_result(name, part())


@torch.inference_mode()
def measure_vae(teacher: Bundle, batches: Batches) -> MetricIntervals:
    """PSNR in dB (mean over images, peak 255) of encoding to the mean and decoding."""
    every = map(image_batch, batches)
    return {"psnr_db": _mean([image_psnr(_reconstruct(teacher, images), images) for images in every])}


def measure_scorer(scorer: ClipScorer, batches: Batches) -> MetricIntervals:
    """Accuracy of the scorer in telling captions apart.

    recall_at_1: among 100 different captions the true one scores highest. one_attribute: the true caption
    scores higher than one with one attribute changed. matched, mismatched: mean cosines, the second with
    another caption of the batch.
    """
    recalled, preferred, matched, mismatched = [], [], [], []
    for indexes in batches:
        scenes = [scene_of(index) for index in indexes]
        draws = [uniform(noise_key("altered caption", index), 1)[0] for index in indexes]
        altered = [change_one_attribute(scene, draw=draw) for scene, draw in zip(scenes, draws, strict=True)]
        images = scorer.encode_images(image_batch(indexes))
        true, wrong = (
            scorer.encode_captions([caption_of(scene) for scene in each]) for each in (scenes, altered)
        )
        # A batch has 100 different captions, so its diagonal has the true ones.
        cosines = images @ true.T
        own = cosines.diagonal()
        recalled.append(cosines.argmax(dim=1) == torch.arange(len(indexes)))
        preferred.append(own > (images * wrong).sum(dim=1))
        matched.append(own)
        mismatched.append(cosines.roll(1, dims=1).diagonal())
    return {
        "recall_at_1": _proportion(torch.cat(recalled)),
        "one_attribute": _proportion(torch.cat(preferred)),
        "matched": _mean(matched),
        "mismatched": _mean(mismatched),
    }


def measure_oracle(oracle: Oracle, batches: Batches) -> MetricIntervals:
    """The proportions of held-out scenes whose attributes are read correctly, each and all five."""
    right = [oracle.score(image_batch(indexes), [scene_of(i) for i in indexes]) for indexes in batches]
    return _attribute_proportions(right)


def measure_floor(teacher: Bundle, *, evaluator: Evaluator) -> MetricIntervals:
    """The Frechet distance of other real images of the same captions, as they are and through the VAE."""
    real, decoded = [], []
    for indexes in evaluator.batches:
        images = image_batch([index + _OTHER_RENDERING_OFFSET for index in indexes])
        real.append(evaluator.moments(images))
        decoded.append(evaluator.moments(_reconstruct(teacher, images)))
    return {"fid_real": evaluator.distance(real), "fid_vae": evaluator.distance(decoded)}


def measure_blocks(model: Bundle, batches: Batches, *, seed: int) -> MetricIntervals:
    """The value of blocks by the rows of SnapFusion Table 3: the error without them over that with them.

    The error is that of the velocity (SnapFusion Eq. 6) at ten times spread over the schedule, each for a
    tenth of the scenes of a batch. 1 means that the blocks have no effect.
    """
    architecture = architecture_of(model.unet)
    row_of = {stage: row for row, stages in paper_stages(architecture).items() for stage in stages}
    groups: dict[str, list[str]] = {}
    for block in architecture.blocks:
        groups.setdefault(f"{row_of[block.stage]} {block.kind}", []).append(block.name)
    whole = _velocity_errors(model, (), batches=batches, seed=seed)
    ratios = {}
    for group, names in groups.items():
        errors = _velocity_errors(model, names, batches=batches, seed=seed)
        ratios[group] = intervals.jackknife(list(zip(errors, whole, strict=True)), _ratio_of_sums)
    return ratios


@torch.inference_mode()
def _velocity_errors(model: Bundle, names: Sequence[str], *, batches: Batches, seed: int) -> list[float]:
    """Mean velocity loss of each batch of held-out scenes, without the named blocks."""
    errors, schedule = [], model.schedule
    for indexes in batches:
        keys = [noise_key("mini blocks", seed, index) for index in indexes]
        x = model.encode_images(image_batch(indexes))
        eps = gaussian_batch(keys, model.latent_shape)
        tenth = schedule.num_steps // 10
        t = torch.arange(len(indexes)) % 10 * tenth + tenth - 1
        c = model.encode_text(model.tokenize([caption_of(scene_of(index)) for index in indexes]))
        with skipping_blocks(model.unet, names):
            estimate = model.denoiser(c)(schedule.diffuse(x=x, eps=eps, t=t), t)
        v_hat = schedule.velocity(x=estimate.x, eps=estimate.eps, t=t)
        errors.append(float(velocity_loss(v_hat, x=x, eps=eps, t=t, schedule=schedule).mean()))
    return errors


def _ratio_of_sums(pairs: Sequence[tuple[float, float]]) -> float:
    numerators, denominators = zip(*pairs, strict=True)
    return sum(numerators) / sum(denominators)


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """Solver, steps and guidance of generated images.

    Attributes:
        solver: of the sampling equation.
        steps: N, network evaluations (pairs of them where guided).
        w: guidance (SnapFusion Eq. 3).
    """

    solver: Solver
    steps: int
    w: float

    def __str__(self) -> str:
        return f"{self.solver} {self.steps} w={self.w:g}"


def measure_samples(
    model: Bundle, sampler: SamplerConfig, *, evaluator: Evaluator, seed: int
) -> MetricIntervals:
    """Attributes, CLIP score and Frechet distance of images generated from held-out scenes' captions."""
    right, clip, moments = [], [], []
    for indexes in evaluator.batches:
        scenes = [scene_of(index) for index in indexes]
        images = generate_images(model, indexes, sampler=sampler, seed=seed)
        right.append(evaluator.oracle.score(images, scenes))
        clip.append(evaluator.scorer.score(images, [caption_of(scene) for scene in scenes]))
        moments.append(evaluator.moments(images))
    return {**_attribute_proportions(right), "clip": _mean(clip), "fid": evaluator.distance(moments)}


@torch.inference_mode()
def generate_images(model: Bundle, indexes: Sequence[int], *, sampler: SamplerConfig, seed: int) -> Tensor:
    """Images uint8 [B,3,32,32] of the captions at `indexes`; the same noise for every model and sampler."""
    keys = [noise_key("mini measurement", seed, index) for index in indexes]
    c = model.encode_text(model.tokenize([caption_of(scene_of(index)) for index in indexes]))
    latents = sample(
        model.denoiser(c, w=sampler.w),
        gaussian_batch(keys, model.latent_shape),
        solver=sampler.solver,
        grid=time_grid(sampler.steps, schedule_steps=model.schedule.num_steps),
        schedule=model.schedule,
        noise=step_noise(keys, model.latent_shape, device=model.device),
    )
    return to_uint8(model.decode(latents))


def held_out_batches(
    count: int, *, batch: int = BATCH, first: int = 0, split: Split | None = None
) -> Batches:
    """`count` held-out indexes of a split from position `first` on; within a batch all captions differ."""
    positions = range(first, first + count)
    indexes = [HELD_OUT + held_out_index(position, split=split) for position in positions]
    return [indexes[start : start + batch] for start in range(0, count, batch)]


def image_psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each image, float32 [B]; both uint8 [B,3,H,W], peak 255."""
    error = (images.float() - reference.float()).square().mean(dim=(1, 2, 3))
    return 10.0 * torch.log10(255.0**2 / error)


@torch.inference_mode()
def _reconstruct(teacher: Bundle, images: Tensor) -> Tensor:
    return to_uint8(teacher.decode(teacher.encode_images(images)))


def _mean(batches: Sequence[Tensor]) -> Interval:
    return intervals.mean(torch.cat(list(batches)).numpy())


def _proportion(right: Tensor) -> Interval:
    return intervals.proportion(int(right.sum()), n=right.numel())


def _attribute_proportions(batches: Sequence[Tensor]) -> MetricIntervals:
    """Of bool [B,5]: each attribute's proportion, the mean over attributes, and that of all correct."""
    right = torch.cat(list(batches))
    each = {name: _proportion(right[:, column]) for column, name in enumerate(STORED_NAMES)}
    mean = intervals.mean(right.float().mean(dim=1).numpy())
    return {**each, "mean": mean, "all": _proportion(right.all(dim=1))}
