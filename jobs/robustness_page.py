"""Pictures and page of what a miniature loses without groups of its blocks. SnapFusion Fig. 5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from jobs.page import render_page
from snapfusion.metrics.intervals import Interval
from snapfusion.mini.measure import draw
from snapfusion.mini.robustness import (
    FIGURES,
    WHOLE,
    Figure,
    NoisedScenes,
    Readings,
    RobustnessMeasurement,
    bring_back,
    drawing_of,
    groups_of,
    noised_scenes,
)
from snapfusion.mini.scenes import caption_of, scene_of
from snapfusion.models.blocks import without
from snapfusion.models.bundle import Bundle

_SHOWN = 3
"""Scenes on the sheet."""

_SCALE = 3
_GAP = 6
_MARGIN = 90
_LINE = 14
_INK, _PAPER = (31, 29, 26), (251, 250, 247)

TITLES: dict[Figure, str] = {"attributes": "Drawn from the caption", "detail": "Brought back from noise"}
"""What is done for each figure."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One scene, as every model shows it.

    Attributes:
        figure: what it is an example of.
        caption: of the scene.
        rows: by model, uint8 [H,W,3] for each column of the sheet.
    """

    figure: Figure
    caption: str
    rows: Mapping[str, tuple[np.ndarray, ...]]


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """Pictures of both models, whole and without each group.

    Attributes:
        columns: their titles; the first is the held-out picture itself, through the VAE.
        examples: those of drawing, then those of bringing back.
    """

    columns: tuple[str, ...]
    examples: tuple[Example, ...]


def draw_sheet(settings: RobustnessMeasurement, *, models: Mapping[str, Bundle]) -> Sheet:
    """The first scenes of the first seed, by every model, whole and without every group."""
    first = next(iter(models.values()))
    groups = {WHOLE: (), **groups_of(first)}
    seed = settings.seeds[0]
    scenes = next(noised_scenes(first, settings, seed=seed, count=_SHOWN))
    columns = {
        name: [_pictures(model, names, scenes=scenes, settings=settings) for names in groups.values()]
        for name, model in models.items()
    }
    held_out = _arrays(scenes.decoded)
    return Sheet(
        columns=("held out", *groups),
        examples=tuple(
            Example(
                figure=figure,
                caption=caption_of(scene_of(index)),
                rows={
                    name: (held_out[number], *(of_group[figure][number] for of_group in by_group))
                    for name, by_group in columns.items()
                },
            )
            for figure in FIGURES
            for number, index in enumerate(scenes.indexes)
        ),
    )


def _pictures(
    model: Bundle, names: Sequence[str], *, scenes: NoisedScenes, settings: RobustnessMeasurement
) -> dict[Figure, np.ndarray]:
    """uint8 [B,H,W,3] of a model without the blocks named, for either figure."""
    with without(model.unet, names):
        drawn = draw(model, scenes.indexes, drawing=drawing_of(settings), seed=settings.seeds[0])
        return {"attributes": _arrays(drawn), "detail": _arrays(bring_back(model, scenes, settings=settings))}


def _arrays(images: Tensor) -> np.ndarray:
    """uint8 [B,H,W,3] of [B,3,H,W]."""
    return images.permute(0, 2, 3, 1).contiguous().numpy()


def sheet_image(sheet: Sheet) -> Image.Image:
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
    *, settings: RobustnessMeasurement, sources: Mapping[str, str], readings: Readings, sheet: Sheet
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
        tables=[_table(readings, figure) for figure in FIGURES],
        sheet=sheet,
        titles=TITLES,
    )


def _table(readings: Readings, figure: Figure) -> dict[str, Any]:
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
