"""What the ablations found, as charts and as a page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jobs.evaluation.images import generate_images
from jobs.reports.charts import Chart, Series
from jobs.reports.page import render_page
from snapfusion.mini.scenes import HELD_OUT, caption_of, scene_of
from snapfusion.models.load import load

_NUM_CAPTIONS = 8
"""Captions whose pictures are shown."""

_TABLE_SCALES = (1.0, 2.0, 4.0, 6.0, 7.0)
"""Guidance scales of the tables."""

_COST_SCALE = 4.0
"""The guidance at which figures are drawn over evaluations of the network."""


@dataclass(frozen=True, kw_only=True)
class LineImages:
    """One line's pictures: its name, and uint8 [H,W,3] of each caption."""

    name: str
    pictures: Sequence[np.ndarray]


def ablation_charts(panel: Mapping[str, Any]) -> dict[str, Chart]:
    """A panel's charts by kind, their lines the means over training seeds."""
    axes = {
        "clip-over-fid": ("CLIP over FID, along guidance", "fid", "clip", "FID", "CLIP"),
        "fid": ("FID over guidance", "w", "fid", "guidance w", "FID"),
        "clip": ("CLIP over guidance", "w", "clip", "guidance w", "CLIP"),
    }
    title, lines = panel["panel"]["title"], panel["over_seeds"]
    charts = {
        kind: Chart(
            title=f"{title}: {said}",
            x_label=x_label,
            y_label=y_label,
            series=tuple(Series(name=line["name"], x=_values(line, x), y=_values(line, y)) for line in lines),
            log_x=x == "fid",
            log_y=y == "fid",
        )
        for kind, (said, x, y, x_label, y_label) in axes.items()
    }
    return {**charts, "cost": _cost_chart(title, lines)} if _differ_in_cost(lines) else charts


def _values(line: Mapping[str, Any], name: str) -> list[float]:
    return [point[name] if name == "w" else point[name][0] for point in line["points"]]


def _differ_in_cost(lines: Sequence[Mapping[str, Any]]) -> bool:
    """Whether students differ in what a picture costs."""
    return len({line["points"][-1]["evaluations"] for line in lines if line["student"]}) > 1


def _cost_chart(title: str, lines: Sequence[Mapping[str, Any]]) -> Chart:
    """FID over evaluations of the UNet, at one guidance: each line is a point."""
    at = {line["name"]: _point_at(line, _COST_SCALE) for line in lines}
    return Chart(
        title=f"{title}: FID over UNet evaluations at w = {_COST_SCALE:g}",
        x_label="UNet evaluations of a picture",
        y_label="FID",
        series=tuple(
            Series(name=name, x=[point["evaluations"]], y=[point["fid"][0]]) for name, point in at.items()
        ),
        log_x=True,
    )


def _point_at(line: Mapping[str, Any], w: float) -> Mapping[str, Any]:
    points: Sequence[Mapping[str, Any]] = line["points"]
    return next(point for point in points if point["w"] == w)


def sample_image_rows(lines: Mapping[str, tuple[str, int]], *, w: float) -> list[LineImages]:
    """What each line, by name its model's source and its DDIM steps, draws of the same captions and noise."""
    return [
        LineImages(
            name=name,
            pictures=generate_images(
                load(source), sample_captions(), steps=steps, guidance=w, seed=0, count=1
            ),
        )
        for name, (source, steps) in lines.items()
    ]


def sample_captions() -> list[str]:
    """The captions of the pictures, from held-out scenes."""
    return [caption_of(scene_of(HELD_OUT + number)) for number in range(_NUM_CAPTIONS)]


def loss_charts(curves: Mapping[str, Sequence[Mapping[str, float]]]) -> list[Chart]:
    """L_dstl of vanilla and of guided steps over training, moving averages, of students by name."""
    charts = []
    for branch in ("vanilla", "guided"):
        name = f"{branch}/loss"
        series = [
            Series(
                name=student,
                x=[point["step"] for point in curve if name in point],
                y=[point[name] for point in curve if name in point],
            )
            for student, curve in curves.items()
            if any(name in point for point in curve)
        ]
        if series:
            charts.append(
                Chart(
                    title=f"L_dstl of {branch} steps",
                    x_label="optimizer step",
                    y_label="L_dstl",
                    series=tuple(series),
                    log_y=True,
                )
            )
    return charts


def render_ablation(
    panels: Sequence[Mapping[str, Any]],
    *,
    curves: Mapping[str, Sequence[Mapping[str, float]]],
    rows: Sequence[LineImages],
    w: float,
) -> str:
    """The page as text.

    Args:
        panels: as `jobs.ablate` writes them.
        curves: of students' training, by name.
        rows: pictures.
        w: their guidance.
    """
    return render_page(
        "ablation.html.j2",
        panels=[
            {
                **panel,
                "charts": list(ablation_charts(panel).values()),
                "table": list(_table(panel)),
                "gaps": list(_gap_rows(panel["evaluation"]["gaps"])),
                "paired": list(_paired_differences(panel)),
                "equal_fid": _equal_fid(panel),
            }
            for panel in panels
        ],
        losses=loss_charts(curves),
        rows=rows,
        captions=sample_captions(),
        w=w,
        scales=_TABLE_SCALES,
    )


def _table(panel: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A panel's figures at a few guidance scales."""
    for line in panel["over_seeds"]:
        points = [point for w in _TABLE_SCALES for point in line["points"] if point["w"] == w]
        yield {"name": line["name"], "points": points, "evaluations": line["points"][-1]["evaluations"]}


def _gap_rows(gaps: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """The shares of a gap that each student closes, at each guidance where they are read."""
    for student in dict.fromkeys(gap["student"] for gap in gaps):
        yield {"student": student, "at": [gap for gap in gaps if gap["student"] == student]}


def _paired_differences(panel: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """How much each student's CLIP is above the few steps', and above the control's of its seed."""
    evaluation = panel["evaluation"]
    controls: Sequence[str] = next(
        (line["contenders"] for line in panel["over_seeds"] if line["name"] == panel["panel"]["control"]), ()
    )
    for line in panel["over_seeds"]:
        for seed, name in enumerate(line["contenders"] if line["student"] else []):
            yield {
                "name": name,
                "against": panel["panel"]["baseline"],
                "at": _differences_at(evaluation, name),
            }
            if controls and name not in controls:
                control = controls[seed]
                yield {
                    "name": name,
                    "against": control,
                    "at": _differences_at(evaluation["against"][control], name),
                }


def _differences_at(readings: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    """The differences of one contender at the tables' guidance scales."""
    return [told for w in _TABLE_SCALES for told in readings["differences"][name] if told["w"] == w]


def _equal_fid(panel: Mapping[str, Any]) -> dict[str, Any]:
    """The reading at equal FID of each student against many steps. SnapFusion Fig. 4."""
    against = panel["evaluation"]["against"].get(panel["panel"]["many"], {"equal_fid": {}})
    students = {name for line in panel["over_seeds"] if line["student"] for name in line["contenders"]}
    return {name: reading for name, reading in against["equal_fid"].items() if name in students}
