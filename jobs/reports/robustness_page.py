"""Pictures and page of what a miniature loses without groups of its blocks. SnapFusion Fig. 5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from jobs.reports.page import render_page
from snapfusion.metrics.intervals import Interval
from snapfusion.mini.measure import generate_images
from snapfusion.mini.robustness import (
    METRIC_NAMES,
    WHOLE,
    Metric,
    NoisedBatch,
    RobustnessResults,
    denoise,
    groups_of,
    noised_batches,
    sampler_of,
)
from snapfusion.mini.scenes import caption_of, scene_of
from snapfusion.mini.settings import RobustnessSettings
from snapfusion.models.blocks import skipping_blocks
from snapfusion.models.bundle import Bundle

_NUM_SCENES = 3
"""Scenes on the sheet."""

_SCALE = 3
_GAP = 6
_MARGIN = 90
_LINE = 14
_INK, _PAPER = (31, 29, 26), (251, 250, 247)

TITLES: dict[Metric, str] = {"attributes": "Drawn from the caption", "detail": "Brought back from noise"}
"""What is done for each figure."""


@dataclass(frozen=True, kw_only=True)
class RobustnessExample:
    """One scene, as every model shows it.

    Attributes:
        figure: what it is an example of.
        caption: of the scene.
        rows: by model, uint8 [H,W,3] for each column of the sheet.
    """

    figure: Metric
    caption: str
    rows: Mapping[str, tuple[np.ndarray, ...]]


@dataclass(frozen=True, kw_only=True)
class ImageSheet:
    """Pictures of both models, whole and without each group.

    Attributes:
        columns: their titles; the first is the held-out picture itself, through the VAE.
        examples: those of drawing, then those of bringing back.
    """

    columns: tuple[str, ...]
    examples: tuple[RobustnessExample, ...]


def sample_sheet(settings: RobustnessSettings, *, models: Mapping[str, Bundle]) -> ImageSheet:
    """The first scenes of the first seed, by every model, whole and without every group."""
    first = next(iter(models.values()))
    groups = {WHOLE: (), **groups_of(first)}
    seed = settings.seeds[0]
    scenes = next(noised_batches(first, settings, seed=seed, count=_NUM_SCENES))
    columns = {
        name: [_images(model, names, scenes=scenes, settings=settings) for names in groups.values()]
        for name, model in models.items()
    }
    held_out = _arrays(scenes.decoded)
    return ImageSheet(
        columns=("held out", *groups),
        examples=tuple(
            RobustnessExample(
                figure=figure,
                caption=caption_of(scene_of(index)),
                rows={
                    name: (held_out[number], *(of_group[figure][number] for of_group in by_group))
                    for name, by_group in columns.items()
                },
            )
            for figure in METRIC_NAMES
            for number, index in enumerate(scenes.indexes)
        ),
    )


def _images(
    model: Bundle, names: Sequence[str], *, scenes: NoisedBatch, settings: RobustnessSettings
) -> dict[Metric, np.ndarray]:
    """uint8 [B,H,W,3] of a model without the blocks named, for either figure."""
    with skipping_blocks(model.unet, names):
        drawn = generate_images(model, scenes.indexes, sampler=sampler_of(settings), seed=settings.seeds[0])
        return {"attributes": _arrays(drawn), "detail": _arrays(denoise(model, scenes, settings=settings))}


def _arrays(images: Tensor) -> np.ndarray:
    """uint8 [B,H,W,3] of [B,3,H,W]."""
    return images.permute(0, 2, 3, 1).contiguous().numpy()


def sheet_image(sheet: ImageSheet) -> Image.Image:
    """The sheet as one picture, each pixel of its pictures a square."""
    side = _SCALE * len(next(iter(sheet.examples[0].rows.values()))[0])
    width = _MARGIN + len(sheet.columns) * (side + _GAP)
    example = 2 * _LINE + len(sheet.examples[0].rows) * (side + _GAP)
    image = Image.new("RGB", (width, 2 * _LINE + len(sheet.examples) * example), _PAPER)
    pen = ImageDraw.Draw(image)
    for column, title in enumerate(sheet.columns):
        kind, _, side_of_unet = title.partition(" ")
        for line, words in enumerate((kind, side_of_unet)):
            pen.text((_MARGIN + column * (side + _GAP), line * _LINE), words, fill=_INK)
    for number, told in enumerate(sheet.examples):
        top = 2 * _LINE + number * example
        pen.text((_MARGIN, top + _LINE // 2), f"{TITLES[told.figure]}: {told.caption}", fill=_INK)
        for row, (model, pictures) in enumerate(told.rows.items()):
            y = top + 2 * _LINE + row * (side + _GAP)
            pen.text((_GAP, y + side // 2), model, fill=_INK)
            for column, picture in enumerate(pictures):
                shown = Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST)
                image.paste(shown, (_MARGIN + column * (side + _GAP), y))
    return image


def render_robustness(
    *,
    settings: RobustnessSettings,
    sources: Mapping[str, str],
    readings: RobustnessResults,
    sheet: ImageSheet,
) -> str:
    """The page as text.

    Args:
        settings: of the measurement.
        sources: what the models are called.
        readings: all of them.
        sheet: of pictures.
    """
    return render_page(
        "robustness.html.j2",
        settings=settings,
        sources=sources,
        tables=[_table(readings, figure) for figure in METRIC_NAMES],
        sheet=sheet,
        titles=TITLES,
    )


def _table(readings: RobustnessResults, figure: Metric) -> dict[str, Any]:
    """A figure's rows: without each group, on average, and by seed."""

    def values(group: str) -> dict[str, Interval]:
        return {model: readings.value(figure, model=model, group=group) for model in ("plain", "robust")}

    return {
        "figure": figure,
        "whole": values(WHOLE),
        "groups": {group: (values(group), readings.lost(figure, group=group)) for group in readings.groups},
        "average": readings.lost_on_average(figure),
        "below_plain": readings.below_plain(figure),
        "seeds": {seed: readings.lost_on_average(figure, seeds=[seed]) for seed in readings.seeds},
    }
