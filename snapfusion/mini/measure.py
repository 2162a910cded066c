"""The figures of a miniature, on scenes that no training saw."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor

from snapfusion.metrics.clip import ClipScorer, load_scorer
from snapfusion.mini.oracle import Oracle, load_oracle
from snapfusion.mini.scenes import ATTRIBUTES, HELD_OUT, Scene, caption_of, change_one, image_batch, scene_of
from snapfusion.mini.weights import WEIGHTS
from snapfusion.models.bundle import Bundle, to_uint8
from snapfusion.models.load import load
from snapfusion.noise import gaussian_batch, noise_key, uniform
from snapfusion.sampling import sample, time_grid
from snapfusion.settings import Settings

_BATCH = 100
"""Pictures at a time; also how many captions the scorer has to tell apart."""


class MiniMeasurement(Settings):
    """What is measured."""

    seed: int = Field(default=0, ge=0, description="of the noise that pictures are generated from")
    scenes: int = Field(default=1000, ge=_BATCH, multiple_of=_BATCH, description="held-out scenes")
    generated: int = Field(default=300, ge=1, description="pictures that the teacher makes at each guidance")
    steps: int = Field(default=50, gt=0, le=1000, description="DDIM steps of the teacher")
    guidance: tuple[float, ...] = (1.0, 2.0, 3.0)


Figures = dict[str, float]


def measure(
    settings: MiniMeasurement,
    *,
    folder: Path = WEIGHTS,
    on_figures: Callable[[str, Figures], None] | None = None,
) -> dict[str, Figures]:
    """All figures of the weights in `folder`, by part; `on_figures` is told of each part as it is ready."""
    teacher, scorer, oracle = (
        load(str(folder / "sd")),
        load_scorer(folder / "scorer"),
        load_oracle(folder / "oracle"),
    )
    parts: dict[str, Callable[[], Figures]] = {
        "vae": lambda: measure_vae(teacher, count=settings.scenes),
        "scorer": lambda: measure_scorer(scorer, count=settings.scenes),
        "oracle": lambda: measure_oracle(oracle, count=settings.scenes),
    }
    for w in settings.guidance:
        parts[f"teacher w={w:g}"] = partial(
            measure_teacher, teacher, scorer=scorer, oracle=oracle, w=w, settings=settings
        )
    figures: dict[str, Figures] = {}
    for name, part in parts.items():
        figures[name] = part()
        if on_figures is not None:
            on_figures(name, figures[name])
    return figures


@torch.inference_mode()
def measure_vae(teacher: Bundle, *, count: int) -> Figures:
    """PSNR in dB (mean over pictures, peak 255) of encoding to the mean and decoding."""
    psnrs = []
    for indexes in held_out(count):
        images = image_batch(indexes)
        psnrs.append(psnr(to_uint8(teacher.decode(teacher.encode_images(images))), images))
    return {"psnr_db": float(torch.cat(psnrs).mean()), "n": count}


def measure_scorer(scorer: ClipScorer, *, count: int) -> Figures:
    """How well the scorer tells captions apart.

    recall_at_1: among 100 different captions the true one scores highest. one_attribute: the true caption
    scores higher than one with one attribute changed. matched, mismatched: mean cosines, the second with a
    neighbour's caption.
    """
    recalled, preferred, matched, mismatched = [], [], [], []
    for indexes in held_out(count):
        scenes = [scene_of(index) for index in indexes]
        images = scorer.encode_images(image_batch(indexes))
        true = scorer.encode_captions([caption_of(scene) for scene in scenes])
        altered = scorer.encode_captions([caption_of(scene) for scene in _altered(scenes, indexes)])
        cosines = images @ true.T
        own = cosines.diagonal()
        recalled.append(cosines.argmax(dim=1) == torch.arange(len(indexes)))
        preferred.append(own > (images * altered).sum(dim=1))
        matched.append(own)
        mismatched.append(cosines.roll(1, dims=1).diagonal())
    named = {
        "recall_at_1": recalled,
        "one_attribute": preferred,
        "matched": matched,
        "mismatched": mismatched,
    }
    return {name: float(torch.cat(values).float().mean()) for name, values in named.items()} | {"n": count}


def measure_oracle(oracle: Oracle, *, count: int) -> Figures:
    """The share of held-out scenes whose attributes are read right, each and all five."""
    right = [
        oracle.score(image_batch(indexes), [scene_of(i) for i in indexes]) for indexes in held_out(count)
    ]
    return _shares(torch.cat(right)) | {"n": count}


def measure_teacher(
    teacher: Bundle, *, scorer: ClipScorer, oracle: Oracle, w: float, settings: MiniMeasurement
) -> Figures:
    """What the oracle and the scorer say of pictures generated from held-out scenes' captions."""
    right, clip = [], []
    for indexes in held_out(settings.generated):
        scenes = [scene_of(index) for index in indexes]
        images = generate(teacher, indexes, w=w, settings=settings)
        right.append(oracle.score(images, scenes))
        clip.append(scorer.score(images, [caption_of(scene) for scene in scenes]))
    return _shares(torch.cat(right)) | {"clip": float(torch.cat(clip).mean()), "n": settings.generated}


@torch.inference_mode()
def generate(teacher: Bundle, indexes: Sequence[int], *, w: float, settings: MiniMeasurement) -> Tensor:
    """Pictures uint8 [B,3,32,32] of the captions at `indexes`, by DDIM on the trailing grid."""
    keys = [noise_key("mini measurement", settings.seed, index) for index in indexes]
    c = teacher.encode_text(teacher.tokenize([caption_of(scene_of(index)) for index in indexes]))
    latents = sample(
        teacher.denoiser(c, w=w),
        gaussian_batch(keys, teacher.latent_shape),
        grid=time_grid(settings.steps, schedule_steps=teacher.schedule.num_steps),
        schedule=teacher.schedule,
    )
    return to_uint8(teacher.decode(latents))


def held_out(count: int) -> Iterator[range]:
    """The first `count` held-out indexes in batches of 100, within each of which all captions differ."""
    for start in range(HELD_OUT, HELD_OUT + count, _BATCH):
        yield range(start, min(start + _BATCH, HELD_OUT + count))


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each picture, float32 [B]; both uint8 [B,3,H,W], peak 255."""
    error = (images.float() - reference.float()).square().mean(dim=(1, 2, 3))
    return 10.0 * torch.log10(255.0**2 / error)


def _altered(scenes: Sequence[Scene], indexes: Sequence[int]) -> list[Scene]:
    draws = [uniform(noise_key("altered caption", index), 1)[0] for index in indexes]
    return [change_one(scene, draw=draw) for scene, draw in zip(scenes, draws, strict=True)]


def _shares(right: Tensor) -> Figures:
    shares = dict(zip(ATTRIBUTES, right.float().mean(dim=0).tolist(), strict=True))
    return {**shares, "mean": float(right.float().mean()), "all": float(right.all(dim=1).float().mean())}
