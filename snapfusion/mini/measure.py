"""The figures of a miniature, on scenes that no training saw, with 95 % intervals."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial, reduce
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
from snapfusion.mini.scenes import HELD_OUT, Scene, caption_of, change_one_attribute, image_batch, scene_of
from snapfusion.mini.settings import _BATCH, MiniMeasurementSettings
from snapfusion.mini.vocabulary import ATTRIBUTES, NUM_CAPTIONS
from snapfusion.mini.weights import WEIGHTS
from snapfusion.models.architecture import Block
from snapfusion.models.blocks import blocks_of, skipping_blocks
from snapfusion.models.bundle import Bundle, to_uint8
from snapfusion.models.load import load
from snapfusion.noise import gaussian_batch, noise_key, uniform
from snapfusion.sampling import sample, time_grid
from snapfusion.solver_names import Solver

_OTHER_RENDERING_OFFSET = 10_000 * NUM_CAPTIONS
"""So far from a held-out index lies another drawing of the same caption."""

MetricIntervals = dict[str, Interval]
ResultCallback = Callable[[str, MetricIntervals], None]
"""Told of a part's name and figures as they are ready."""


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """What pictures are judged by.

    Attributes:
        scorer: gives the CLIP score.
        oracle: reads attributes; its features are those of the Frechet distance.
        count: of held-out scenes.
    """

    scorer: ClipScorer
    oracle: Oracle
    count: int

    @cached_property
    def reference(self) -> tuple[Moments, ...]:
        """The oracle's features of the held-out scenes' own pictures, a hundred at a time."""
        return tuple(self.moments(image_batch(indexes)) for indexes in held_out_batches(self.count))

    @torch.inference_mode()
    def moments(self, images: Tensor) -> Moments:
        """Of the oracle's features of uint8 [B,3,32,32]."""
        return Moments.of(self.oracle.features(images))

    def distance(self, groups: Sequence[Moments]) -> Interval:
        """Frechet distance to `reference`, to whose groups `groups` correspond by their captions."""
        pairs = list(zip(groups, self.reference, strict=True))
        return intervals.jackknife(pairs, _distance)


def measure_mini(
    settings: MiniMeasurementSettings,
    *,
    folder: Path = WEIGHTS,
    gather: ResultCallback,
    known: Collection[str] = (),
) -> None:
    """Every figure of the weights in `folder`, part by part, but for the parts whose names are `known`."""
    judges = Evaluator(
        scorer=load_scorer(folder / "scorer"), oracle=load_oracle(folder / "oracle"), count=settings.scenes
    )
    vae = load(str(folder / "sd"))
    parts: dict[str, Callable[[], MetricIntervals]] = {
        "vae": lambda: measure_vae(vae, count=settings.scenes),
        "scorer": lambda: measure_scorer(judges.scorer, count=settings.scenes),
        "oracle": lambda: measure_oracle(judges.oracle, count=settings.scenes),
        "floor": lambda: measure_floor(vae, judges=judges),
    }
    for name in settings.models:
        model = load(str(folder / name))
        parts[f"{name} blocks"] = partial(measure_blocks, model, count=settings.scenes, seed=settings.seed)
        for drawing in sampler_configs(settings):
            parts[f"{name} {drawing}"] = partial(
                measure_samples, model, drawing, judges=judges, seed=settings.seed
            )
    for name, part in parts.items():
        if name not in known:
            gather(name, part())


@torch.inference_mode()
def measure_vae(teacher: Bundle, *, count: int) -> MetricIntervals:
    """PSNR in dB (mean over pictures, peak 255) of encoding to the mean and decoding."""
    psnrs = []
    for indexes in held_out_batches(count):
        images = image_batch(indexes)
        psnrs.append(image_psnr(_reconstruct(teacher, images), images))
    return {"psnr_db": intervals.mean(torch.cat(psnrs).numpy())}


def measure_scorer(scorer: ClipScorer, *, count: int) -> MetricIntervals:
    """How well the scorer tells captions apart.

    recall_at_1: among 100 different captions the true one scores highest. one_attribute: the true caption
    scores higher than one with one attribute changed. matched, mismatched: mean cosines, the second with a
    neighbour's caption.
    """
    recalled, preferred, matched, mismatched = [], [], [], []
    for indexes in held_out_batches(count):
        scenes = [scene_of(index) for index in indexes]
        images = scorer.encode_images(image_batch(indexes))
        true = scorer.encode_captions([caption_of(scene) for scene in scenes])
        altered = scorer.encode_captions([caption_of(scene) for scene in _altered_scenes(scenes, indexes)])
        cosines = images @ true.T
        own = cosines.diagonal()
        recalled.append(cosines.argmax(dim=1) == torch.arange(len(indexes)))
        preferred.append(own > (images * altered).sum(dim=1))
        matched.append(own)
        mismatched.append(cosines.roll(1, dims=1).diagonal())
    return {
        "recall_at_1": _share(torch.cat(recalled)),
        "one_attribute": _share(torch.cat(preferred)),
        "matched": intervals.mean(torch.cat(matched).numpy()),
        "mismatched": intervals.mean(torch.cat(mismatched).numpy()),
    }


def measure_oracle(oracle: Oracle, *, count: int) -> MetricIntervals:
    """The share of held-out scenes whose attributes are read right, each and all five."""
    right = [
        oracle.score(image_batch(indexes), [scene_of(i) for i in indexes])
        for indexes in held_out_batches(count)
    ]
    return _shares(torch.cat(right))


def measure_floor(teacher: Bundle, *, judges: Evaluator) -> MetricIntervals:
    """The Frechet distance of other real pictures of the same captions, as they are and through the VAE."""
    real, decoded = [], []
    for indexes in held_out_batches(judges.count):
        images = image_batch([index + _OTHER_RENDERING_OFFSET for index in indexes])
        real.append(judges.moments(images))
        decoded.append(judges.moments(_reconstruct(teacher, images)))
    return {"fid_real": judges.distance(real), "fid_vae": judges.distance(decoded)}


def measure_blocks(model: Bundle, *, count: int, seed: int) -> MetricIntervals:
    """What blocks are worth, by the rows of SnapFusion Table 3: the error without over that with them.

    The error is that of the velocity (SnapFusion Eq. 6) at ten times spread over the schedule, each taken by
    a tenth of the scenes of a batch. 1 means that the blocks do nothing.
    """
    groups: dict[str, list[str]] = {}
    deepest = len(model.unet.down_blocks) - 1
    for block in blocks_of(model.unet):
        groups.setdefault(f"{_table3_row(block, deepest=deepest)} {block.kind}", []).append(block.name)
    whole = _velocity_errors(model, (), count=count, seed=seed)
    figures = {}
    for group, names in groups.items():
        pairs = list(zip(_velocity_errors(model, names, count=count, seed=seed), whole, strict=True))
        figures[group] = intervals.jackknife(pairs, _ratio)
    return figures


@torch.inference_mode()
def _velocity_errors(model: Bundle, names: Sequence[str], *, count: int, seed: int) -> list[float]:
    """Mean velocity loss of each batch of held-out scenes, without the blocks named."""
    errors = []
    for indexes in held_out_batches(count):
        keys = [noise_key("mini blocks", seed, index) for index in indexes]
        x = model.encode_images(image_batch(indexes))
        eps = gaussian_batch(keys, model.latent_shape)
        t = (
            torch.arange(len(indexes)) % 10 * (model.schedule.num_steps // 10)
            + model.schedule.num_steps // 10
            - 1
        )
        c = model.encode_text(model.tokenize([caption_of(scene_of(index)) for index in indexes]))
        z_t = model.schedule.diffuse(x=x, eps=eps, t=t)
        with skipping_blocks(model.unet, names):
            estimate = model.denoiser(c)(z_t, t)
        v_hat = model.schedule.velocity(x=estimate.x, eps=estimate.eps, t=t)
        errors.append(float(velocity_loss(v_hat, x=x, eps=eps, t=t, schedule=model.schedule).mean()))
    return errors


def _table3_row(block: Block, *, deepest: int) -> str:
    """The stage in Table 3's words, whose "Mid" is all that works at the smallest size."""
    side, number = [*block.stage.split("."), "0"][:2]
    if block.depth == deepest:
        return "Mid"
    return f"Down-{int(number) + 1}" if side == "down_blocks" else f"Up-{int(number)}"


def _ratio(pairs: Sequence[tuple[float, float]]) -> float:
    without_blocks, whole = zip(*pairs, strict=True)
    return sum(without_blocks) / sum(whole)


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How a model draws.

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


def sampler_configs(settings: MiniMeasurementSettings) -> list[SamplerConfig]:
    """Every combination of solver, steps and guidance."""
    return [
        SamplerConfig(solver=solver, steps=steps, w=w)
        for solver in settings.solvers
        for steps in settings.steps
        for w in settings.guidance
    ]


def measure_samples(
    model: Bundle, drawing: SamplerConfig, *, judges: Evaluator, seed: int
) -> MetricIntervals:
    """What oracle, scorer and Frechet distance say of pictures drawn from held-out scenes' captions."""
    right, clip, groups = [], [], []
    for indexes in held_out_batches(judges.count):
        scenes = [scene_of(index) for index in indexes]
        images = generate_images(model, indexes, drawing=drawing, seed=seed)
        right.append(judges.oracle.score(images, scenes))
        clip.append(judges.scorer.score(images, [caption_of(scene) for scene in scenes]))
        groups.append(judges.moments(images))
    return {
        **_shares(torch.cat(right)),
        "clip": intervals.mean(torch.cat(clip).numpy()),
        "fid": judges.distance(groups),
    }


@torch.inference_mode()
def generate_images(model: Bundle, indexes: Sequence[int], *, drawing: SamplerConfig, seed: int) -> Tensor:
    """Pictures uint8 [B,3,32,32] of the captions at `indexes`; the same noise for every model and way."""
    keys = [noise_key("mini measurement", seed, index) for index in indexes]
    c = model.encode_text(model.tokenize([caption_of(scene_of(index)) for index in indexes]))
    latents = sample(
        model.denoiser(c, w=drawing.w),
        gaussian_batch(keys, model.latent_shape),
        solver=drawing.solver,
        grid=time_grid(drawing.steps, schedule_steps=model.schedule.num_steps),
        schedule=model.schedule,
    )
    return to_uint8(model.decode(latents))


def held_out_batches(count: int, *, batch: int = _BATCH, first: int = 0) -> Iterator[range]:
    """`count` held-out indexes from number `first` on, in batches; within each all captions differ."""
    end = HELD_OUT + first + count
    for start in range(HELD_OUT + first, end, batch):
        yield range(start, min(start + batch, end))


def image_psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each picture, float32 [B]; both uint8 [B,3,H,W], peak 255."""
    error = (images.float() - reference.float()).square().mean(dim=(1, 2, 3))
    return 10.0 * torch.log10(255.0**2 / error)


def _reconstruct(teacher: Bundle, images: Tensor) -> Tensor:
    with torch.inference_mode():
        return to_uint8(teacher.decode(teacher.encode_images(images)))


def _altered_scenes(scenes: Sequence[Scene], indexes: Sequence[int]) -> list[Scene]:
    draws = [uniform(noise_key("altered caption", index), 1)[0] for index in indexes]
    return [change_one_attribute(scene, draw=draw) for scene, draw in zip(scenes, draws, strict=True)]


def _distance(pairs: Sequence[tuple[Moments, Moments]]) -> float:
    drawn, real = (reduce(Moments.merge, side) for side in zip(*pairs, strict=True))
    return frechet_distance(drawn, real)


def _share(right: Tensor) -> Interval:
    return intervals.share(int(right.sum()), n=right.numel())


def _shares(right: Tensor) -> MetricIntervals:
    """Of bool [B,5]: each attribute's share, the mean over attributes, and the share with all right."""
    shares = {name: _share(right[:, column]) for column, name in enumerate(ATTRIBUTES)}
    mean = intervals.mean(right.float().mean(dim=1).numpy())
    return {**shares, "mean": mean, "all": _share(right.all(dim=1))}
