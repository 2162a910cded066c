"""Renders the results of the ablations as charts and as a page."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jobs.cli.ablation import PanelResults
from jobs.evaluation.images import generate_images
from jobs.evaluation.results import Comparison
from jobs.recipes.ablation import Line
from jobs.reports.charts import Chart, Series
from jobs.reports.evaluation_page import PASSES_LABEL, floor_of, title_of
from jobs.reports.page import render_page
from snapfusion.mini.scenes import HELD_OUT, caption_of, scene_of
from snapfusion.models.load import load
from snapfusion.training.settings import BRANCHES

_NUM_CAPTIONS = 8
_TABLE_SCALES = (1.0, 2.0, 4.0, 6.0, 7.0)
"""Guidance scales of the tables."""

_AXES = {
    "clip-over-fid": ("CLIP over FID, along guidance", "fid", "clip", "FID", "CLIP"),
    "fid": ("FID over guidance", "w", "fid", "guidance w", "FID"),
    "clip": ("CLIP over guidance", "w", "clip", "guidance w", "CLIP"),
}


def ablation_charts(panel: PanelResults) -> dict[str, Chart]:
    """The charts of a panel by kind; each line is the mean over training seeds.

    Of the free baselines only the best is shown, by FID at the guidance chosen on the tuning captions.
    """
    title, lines = panel["panel"]["title"], shown_lines(panel)
    floor, note = floor_of(panel["evaluation"]), title_of(panel["evaluation"])
    charts = {
        kind: Chart(
            title=f"{title}: {name}",
            x_label=x_label,
            y_label=y_label,
            series=tuple(Series.of(line["name"], line["points"], x=x, y=y) for line in lines),
            log_x=x == "fid",
            log_y=y == "fid",
            limit=floor if y == "fid" else None,
            note=note,
        )
        for kind, (name, x, y, x_label, y_label) in _AXES.items()
    }
    best = [line for line in lines if line.get("best") is not None]
    return {**charts, "passes": _passes_chart(title, best, floor=floor, note=note)} if best else charts


def shown_lines(panel: PanelResults) -> list[dict[str, Any]]:
    """The lines without the free baselines that another one is better than."""
    lines = panel["over_seeds"]
    free = {line.label for line in map(Line.parse, panel["panel"]["lines"]) if line.is_free}
    rivals = [line for line in lines if line["name"] in free and line.get("best") is not None]
    best = min(rivals, key=lambda line: line["best"]["fid"][0], default=None)
    return [line for line in lines if line["name"] not in free or line is best]


def _passes_chart(title: str, lines: Sequence[Mapping[str, Any]], *, floor: float | None, note: str) -> Chart:
    """FID over passes of the UNet, each line at the guidance chosen on the tuning captions."""
    return Chart(
        title=f"{title}: FID over UNet passes, at the guidance chosen on the tuning captions",
        x_label=PASSES_LABEL,
        y_label="FID",
        series=tuple(Series.of(line["name"], [line["best"]], x="evaluations", y="fid") for line in lines),
        log_x=True,
        limit=floor,
        note=note,
    )


def sample_image_rows(lines: Mapping[str, tuple[str, int]], *, w: float) -> dict[str, list[np.ndarray]]:
    """Images of the same captions and noise by each line's model source in its DDIM steps, uint8 [H,W,3]."""
    captions = sample_captions()
    return {
        name: generate_images(load(source), captions, steps=steps, guidance=w, seed=0, count=1)
        for name, (source, steps) in lines.items()
    }


def sample_captions() -> list[str]:
    """The captions of the images, of held-out scenes."""
    return [caption_of(scene_of(HELD_OUT + index)) for index in range(_NUM_CAPTIONS)]


def loss_charts(curves: Mapping[str, Sequence[Mapping[str, float]]]) -> list[Chart]:
    """L_dstl of vanilla and of guided steps over training, as moving averages, by student."""
    charts = []
    for branch in BRANCHES.values():
        lines = [Series.of(name, curve, x="step", y=f"{branch}/loss") for name, curve in curves.items()]
        if series := tuple(line for line in lines if line.x):
            title = f"L_dstl of {branch} steps"
            charts.append(
                Chart(title=title, x_label="optimizer step", y_label="L_dstl", series=series, log_y=True)
            )
    return charts


def render_ablation(
    panels: Sequence[PanelResults],
    *,
    curves: Mapping[str, Sequence[Mapping[str, float]]],
    rows: Mapping[str, Sequence[np.ndarray]],
    w: float,
) -> str:
    """The page as text.

    Args:
        panels: as `jobs.ablate` writes them.
        curves: of students' training, by name.
        rows: images of each line, by its name, uint8 [H,W,3], one per caption.
        w: their guidance scale.
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
                "decided": list(_decided_differences(panel)),
            }
            for panel in panels
        ],
        losses=loss_charts(curves),
        rows=rows,
        captions=sample_captions(),
        w=w,
    )


def _table(panel: PanelResults) -> Iterator[dict[str, Any]]:
    """The metrics of each line at the guidance scales of the tables."""
    for line in panel["over_seeds"]:
        points = _at_table_scales(line["points"])
        yield {"name": line["name"], "points": points, "evaluations": line["points"][-1]["evaluations"]}


def _gap_rows(gaps: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """The share of the FID gap that each student closes, at each guidance scale."""
    for student in dict.fromkeys(gap["student"] for gap in gaps):
        yield {"student": student, "at": [gap for gap in gaps if gap["student"] == student]}


def _decided_differences(panel: PanelResults) -> Iterator[dict[str, Any]]:
    """The differences of each student to each reference, averaged over guidance and seeds."""
    for line in panel["over_seeds"]:
        for reference, metrics in line.get("differences", {}).items():
            yield {"name": line["name"], "reference": reference, **metrics}


def _paired_differences(panel: PanelResults) -> Iterator[dict[str, Any]]:
    """CLIP of each student above that of the baseline, and above that of the control of its seed."""
    evaluation, labels = panel["evaluation"], panel["panel"]
    contenders = {line["name"]: line["contenders"] for line in panel["over_seeds"]}
    controls: Sequence[str] = contenders.get(labels["control"], ())
    for line in panel["over_seeds"]:
        for seed, name in enumerate(line["contenders"] if line["student"] else []):
            compared: dict[str, Comparison] = {labels["baseline"]: evaluation}
            if controls and name not in controls:
                compared[controls[seed]] = evaluation["against"][controls[seed]]
            for reference, readings in compared.items():
                differences = _at_table_scales(readings["differences"][name])
                yield {"name": name, "reference": reference, "at": differences}


def _at_table_scales(points: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [point for w in _TABLE_SCALES for point in points if point["w"] == w]


def _equal_fid(panel: PanelResults) -> dict[str, Any]:
    """CLIP of each student above that of many steps at equal FID. SnapFusion Fig. 4."""
    against = panel["evaluation"]["against"].get(panel["panel"]["many"])
    readings = against["equal_fid"] if against else {}
    students = {name for line in panel["over_seeds"] if line["student"] for name in line["contenders"]}
    return {name: reading for name, reading in readings.items() if name in students}
