"""The page of the miniature's training and figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jobs.reports.charts import Chart, Series
from jobs.reports.page import render_page
from snapfusion.metrics.intervals import Interval
from snapfusion.mini.measure import SamplerConfig, generate_images
from snapfusion.mini.scenes import HELD_OUT, caption_of, scene_of
from snapfusion.mini.weights import read_manifest
from snapfusion.models.load import load

_NUM_IMAGES = 16
_SAMPLER = SamplerConfig(solver="ddim", steps=50, w=2.0)

_STAGES = {
    "autoencoder": "VAE, both halves",
    "decoder": "VAE, decoder alone",
    "text": "text encoder",
    "scorer": "scorer",
    "oracle": "oracle",
    "denoiser": "UNet, eps",
    "velocity": "UNet, v, from the weights of the former (Eq. 6)",
}


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """Pictures of one model.

    Attributes:
        title: what drew them.
        pictures: (uint8 [H,W,3], caption) each.
    """

    title: str
    pictures: Sequence[tuple[np.ndarray, str]]


def write_page(weights: Path, place: Path, *, figures: Mapping[str, Mapping[str, Interval]]) -> Path:
    """Draw sixteen pictures with each model of `weights` and write the page to `place`, which is returned.

    Args:
        weights: folder with a manifest and the models.
        place: of the HTML file.
        figures: by part, as `jobs.measure_mini` has them; may be empty.
    """
    indexes = [HELD_OUT + number * 77 for number in range(_NUM_IMAGES)]
    galleries = []
    for name in ("sd", "sd-v"):
        images = (
            generate_images(load(str(weights / name)), indexes, sampler=_SAMPLER, seed=0)
            .permute(0, 2, 3, 1)
            .numpy()
        )
        captions = [caption_of(scene_of(index)) for index in indexes]
        galleries.append(
            Gallery(title=f"{name}: {_SAMPLER}", pictures=list(zip(images, captions, strict=True)))
        )
    text = render_miniature(manifest=read_manifest(weights), galleries=galleries, figures=figures)
    place.write_text(text, encoding="utf-8")
    return place


def render_miniature(
    *,
    manifest: Mapping[str, Any],
    galleries: Sequence[Gallery],
    figures: Mapping[str, Mapping[str, Interval]],
) -> str:
    """The page as text.

    Args:
        manifest: of the weights, with their recipe, time and curves.
        galleries: pictures that the models draw.
        figures: by part, as `jobs.measure_mini` writes them; may be empty.
    """
    parts = {part: told for part, told in figures.items() if "fid" not in told}
    drawn = {part: told for part, told in figures.items() if "fid" in told}
    return render_page(
        "mini_page.html.j2",
        manifest=manifest,
        curves=[_curve(stage, manifest["curves"][stage]) for stage in _STAGES if stage in manifest["curves"]],
        galleries=galleries,
        parts=parts,
        drawn=drawn,
        sweeps=[chart for name in ("fid", "clip") for chart in _sweeps(drawn, name=name)],
    )


def _curve(stage: str, points: Sequence[tuple[int, float]]) -> Chart:
    steps, losses = zip(*points, strict=True)
    return Chart(
        title=_STAGES[stage],
        x_label="step",
        y_label="loss",
        series=(Series(name="training loss", x=steps, y=losses),),
        log_y=min(losses) > 0,
    )


def _sweeps(drawn: Mapping[str, Mapping[str, Interval]], *, name: str) -> list[Chart]:
    """One chart for each model and solver: the figure over steps, a line for each guidance."""
    lines: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for part, told in drawn.items():
        model, solver, steps, w = part.split()
        lines.setdefault(f"{model}, {solver}", {}).setdefault(w, []).append((int(steps), told[name].value))
    charts = []
    for title, by_w in lines.items():
        several = {w: sorted(points) for w, points in by_w.items() if len(points) > 1}
        if several:
            series = tuple(
                Series(name=w.replace("=", " = "), x=[n for n, _ in points], y=[y for _, y in points])
                for w, points in several.items()
            )
            label = {"fid": "Fréchet distance, oracle features", "clip": "CLIP score"}[name]
            charts.append(
                Chart(
                    title=title,
                    x_label="steps",
                    y_label=label,
                    series=series,
                    log_x=True,
                    log_y=name == "fid",
                )
            )
    return charts
