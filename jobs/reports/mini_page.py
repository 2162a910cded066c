"""Renders the page of the miniature's training and metrics."""

from collections.abc import Iterator, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from jobs.reports.charts import Chart, Series
from jobs.reports.page import render_page
from snapfusion.mini.measure import MetricIntervals, SamplerConfig, generate_images
from snapfusion.mini.scenes import HELD_OUT, caption_of, scene_of
from snapfusion.mini.weights import read_manifest
from snapfusion.models.load import load

_NUM_IMAGES = 16
_SAMPLER = SamplerConfig(solver="ddim", steps=50, w=2.0)

_STAGES = {
    "autoencoder": "VAE, encoder and decoder",
    "decoder": "VAE, decoder alone",
    "text": "text encoder",
    "scorer": "scorer",
    "oracle": "oracle",
    "denoiser": "UNet, eps",
    "velocity": "UNet, v, initialised from the UNet of eps (Eq. 6)",
    "noisy_denoiser": "UNet, eps, on noisy captions",
    "noisy_velocity": "UNet, v, on noisy captions",
}
_METRICS = {"fid": "Fréchet distance, oracle features", "clip": "CLIP score"}


def write_page(weights: Path, path: Path, *, figures: Mapping[str, MetricIntervals]) -> Path:
    """Sample sixteen images with each model of `weights` and write the page to `path`, which is returned.

    Args:
        weights: folder with a manifest and the models.
        path: of the HTML file.
        figures: metrics by part, from `jobs.measure_mini`; may be empty.
    """
    indexes = [HELD_OUT + number * 77 for number in range(_NUM_IMAGES)]
    captions = [caption_of(scene_of(index)) for index in indexes]
    galleries = {}
    for name in ("sd", "sd-v"):
        images = generate_images(load(str(weights / name)), indexes, sampler=_SAMPLER, seed=0)
        pixels = images.permute(0, 2, 3, 1).numpy()
        galleries[f"{name}: {_SAMPLER}"] = list(zip(pixels, captions, strict=True))
    text = render_miniature(manifest=read_manifest(weights), galleries=galleries, figures=figures)
    path.write_text(text, encoding="utf-8")
    return path


def render_miniature(
    *,
    manifest: Mapping[str, Any],
    galleries: Mapping[str, Sequence[tuple[np.ndarray, str]]],
    figures: Mapping[str, MetricIntervals],
) -> str:
    """The page as text.

    Args:
        manifest: of the weights, with their recipe and loss curves.
        galleries: (uint8 [H,W,3], caption) of each model, by its name and sampler.
        figures: metrics by part, from `jobs.measure_mini`; may be empty.
    """
    sampling = {part: metrics for part, metrics in figures.items() if "fid" in metrics}
    curves = manifest["curves"]
    return render_page(
        "mini_page.html.j2",
        manifest=manifest,
        curves=[_loss_chart(stage, curves[stage]) for stage in _STAGES if stage in curves],
        galleries=galleries,
        parts={part: metrics for part, metrics in figures.items() if part not in sampling},
        sampling=sampling,
        sweeps=[chart for name in _METRICS for chart in _step_charts(sampling, name=name)],
    )


def _loss_chart(stage: str, points: Sequence[tuple[int, float]]) -> Chart:
    steps, losses = zip(*points, strict=True)
    series = (Series(name="training loss", x=steps, y=losses),)
    return Chart(title=_STAGES[stage], x_label="step", y_label="loss", series=series, log_y=min(losses) > 0)


def _step_charts(sampling: Mapping[str, MetricIntervals], *, name: str) -> Iterator[Chart]:
    """A metric over steps, a chart for each model and solver with a line for each guidance scale."""
    lines: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for part, metrics in sampling.items():
        model, solver, steps, w = part.split()
        point = {"steps": int(steps), **metrics}
        lines.setdefault(f"{model}, {solver}", {}).setdefault(w, []).append(point)
    for title, by_w in lines.items():
        series = tuple(
            Series.of(w.replace("=", " = "), sorted(points, key=itemgetter("steps")), x="steps", y=name)
            for w, points in by_w.items()
            if len(points) > 1  # a single number of steps is no curve
        )
        if series:
            label = _METRICS[name]
            yield Chart(
                title=title, x_label="steps", y_label=label, series=series, log_x=True, log_y=name == "fid"
            )
