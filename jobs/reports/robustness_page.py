"""Renders what a miniature loses without groups of its blocks, as images and as a page. SnapFusion Fig. 5."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from jobs.reports.page import render_page
from snapfusion.metrics.intervals import Interval
from snapfusion.mini import robustness
from snapfusion.mini.measure import generate_images
from snapfusion.mini.scenes import caption_of, scene_of
from snapfusion.mini.settings import RobustnessSettings
from snapfusion.models.blocks import skipping_blocks
from snapfusion.models.bundle import Bundle

_NUM_SCENES = 3
_SCALE = 3
_GAP = 6
_MARGIN = 90
_LINE = 14
_INK, _PAPER = (31, 29, 26), (251, 250, 247)

TITLES: dict[robustness.Metric, str] = {
    "attributes": "Sampled from the caption",
    "detail": "Denoised from a noised image",
}
"""How the images behind each metric are made."""


@dataclass(frozen=True, kw_only=True)
class RobustnessExample:
    """One scene by every model.

    Attributes:
        figure: the metric that it is an example of.
        caption: of the scene.
        rows: by model, uint8 [H,W,3] for each column of the sheet.
    """

    figure: robustness.Metric
    caption: str
    rows: Mapping[str, tuple[np.ndarray, ...]]


@dataclass(frozen=True, kw_only=True)
class ImageSheet:
    """Images by both models, whole and without each group of blocks.

    Attributes:
        columns: their titles; the first is the held-out image itself, through the VAE.
        examples: all of the first metric, then all of the second.
    """

    columns: tuple[str, ...]
    examples: tuple[RobustnessExample, ...]


def sample_sheet(settings: RobustnessSettings, *, models: Mapping[str, Bundle]) -> ImageSheet:
    """The first scenes of the first seed, by every model, whole and without each group."""
    first = next(iter(models.values()))
    groups = {robustness.WHOLE: (), **robustness.groups_of(first)}
    scenes = next(robustness.noised_batches(first, settings, seed=settings.seeds[0], count=_NUM_SCENES))
    images = {
        name: [_images(model, names, scenes=scenes, settings=settings) for names in groups.values()]
        for name, model in models.items()
    }
    # Through the VAE as well: its loss is none of the UNet's blocks.
    held_out = _arrays(scenes.decoded)
    examples = tuple(
        RobustnessExample(
            figure=metric,
            caption=caption_of(scene_of(scene)),
            rows={
                name: (held_out[number], *(group[metric][number] for group in by_group))
                for name, by_group in images.items()
            },
        )
        for metric in robustness.METRIC_NAMES
        for number, scene in enumerate(scenes.indexes)
    )
    return ImageSheet(columns=("held out", *groups), examples=examples)


def _images(
    model: Bundle, names: Sequence[str], *, scenes: robustness.NoisedBatch, settings: RobustnessSettings
) -> dict[robustness.Metric, np.ndarray]:
    """uint8 [B,H,W,3] by a model without the named blocks, for each metric."""
    sampler, seed = robustness.sampler_of(settings), settings.seeds[0]
    with skipping_blocks(model.unet, names):
        sampled = generate_images(model, scenes.indexes, sampler=sampler, seed=seed)
        denoised = robustness.denoise(model, scenes, settings=settings)
    return {"attributes": _arrays(sampled), "detail": _arrays(denoised)}


def _arrays(images: Tensor) -> np.ndarray:
    """uint8 [B,H,W,3] of [B,3,H,W]."""
    return images.permute(0, 2, 3, 1).contiguous().numpy()


def sheet_image(sheet: ImageSheet) -> Image.Image:
    """The sheet as one image, enlarged so that every pixel is a square."""
    side = _SCALE * len(next(iter(sheet.examples[0].rows.values()))[0])
    cell = side + _GAP
    height = 2 * _LINE + len(sheet.examples[0].rows) * cell
    size = (_MARGIN + len(sheet.columns) * cell, 2 * _LINE + len(sheet.examples) * height)
    sheet_pixels = Image.new("RGB", size, _PAPER)
    pen = ImageDraw.Draw(sheet_pixels)
    for column, title in enumerate(sheet.columns):
        kind, _, unet_side = title.partition(" ")
        for line, text in enumerate((kind, unet_side)):
            pen.text((_MARGIN + column * cell, line * _LINE), text, fill=_INK)
    for number, example in enumerate(sheet.examples):
        top = 2 * _LINE + number * height
        pen.text((_MARGIN, top + _LINE // 2), f"{TITLES[example.figure]}: {example.caption}", fill=_INK)
        for row, (model, images) in enumerate(example.rows.items()):
            y = top + 2 * _LINE + row * cell
            pen.text((_GAP, y + side // 2), model, fill=_INK)
            for column, image in enumerate(images):
                enlarged = Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST)
                sheet_pixels.paste(enlarged, (_MARGIN + column * cell, y))
    return sheet_pixels


def render_robustness(
    *,
    settings: RobustnessSettings,
    sources: Mapping[str, str],
    readings: robustness.RobustnessResults,
    sheet: ImageSheet,
) -> str:
    """The page as text.

    Args:
        settings: of the measurement.
        sources: names of the models.
        readings: all results.
        sheet: of images.
    """
    tables = [_table(readings, metric) for metric in robustness.METRIC_NAMES]
    return render_page(
        "robustness.html.j2", settings=settings, sources=sources, tables=tables, sheet=sheet, titles=TITLES
    )


def _table(readings: robustness.RobustnessResults, metric: robustness.Metric) -> dict[str, Any]:
    """The rows of a metric: without each group, on average, and by seed."""

    def values(group: str) -> dict[str, Interval]:
        return {model: readings.value(metric, model=model, group=group) for model in ("plain", "robust")}

    return {
        "figure": metric,
        "whole": values(robustness.WHOLE),
        "groups": {group: (values(group), readings.lost(metric, group=group)) for group in readings.groups},
        "average": readings.lost_on_average(metric),
        "below_plain": readings.below_plain(metric),
        "seeds": {seed: readings.lost_on_average(metric, seeds=[seed]) for seed in readings.seeds},
    }
