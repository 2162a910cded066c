"""Renders the results of an evaluation as charts and as a page."""

from collections.abc import Iterator
from typing import Any

from jobs.evaluation.results import EvaluationResults
from jobs.reports.charts import Chart, Series
from jobs.reports.metric_names import METRIC_NAMES
from jobs.reports.page import render_page

PASSES_LABEL = "UNet passes per image"

_MAX_OTHERS = 5
"""Contenders beside the baseline on one chart."""


def render_evaluation(results: EvaluationResults) -> str:
    """The page as text, from what `jobs.evaluation.evaluation.evaluate` returns."""
    return render_page("evaluation.html.j2", results=results, charts=list(evaluation_charts(results)))


def evaluation_charts(results: EvaluationResults) -> Iterator[Chart]:
    """CLIP over FID and FID over guidance, each with the baseline and up to five other contenders.

    A preference score is drawn as CLIP is. With tuning also FID over the UNet's passes, each contender at the
    guidance chosen on the tuning captions.
    """
    baseline = results["baseline"]
    others = [name for name in results["curves"] if name != baseline]
    scores = ("clip", *(results["protocol"].get("preferences") or ()))
    floor, note = floor_of(results), title_of(results)
    for number, start in enumerate(range(0, max(len(others), 1), _MAX_OTHERS)):
        names = [baseline, *others[start : start + _MAX_OTHERS]]
        part = f" ({number + 1})" if number else ""
        for x, y in (*(("fid", score) for score in scores), ("w", "fid")):
            x_label, y_label = METRIC_NAMES.get(x, "guidance w"), METRIC_NAMES[y]
            title = f"{y_label} over FID, along guidance" if x == "fid" else f"{y_label} over guidance"
            curves = {name: results["curves"][name]["points"] for name in names}
            series = tuple(Series.of(name, points, x=x, y=y) for name, points in curves.items())
            limit = floor if y == "fid" else None
            yield Chart(
                title=f"{title}{part}",
                x_label=x_label,
                y_label=y_label,
                series=series,
                limit=limit,
                note=note,
            )
        best = {name: best_point(results, name) for name in names}
        series = tuple(
            Series.of(name, [point], x="evaluations", y="fid") for name, point in best.items() if point
        )
        if series:
            yield Chart(
                title=f"FID over UNet passes, at the guidance chosen on other captions{part}",
                x_label=PASSES_LABEL,
                y_label="FID",
                series=series,
                log_x=True,
                limit=floor,
                note=note,
            )


def floor_of(results: EvaluationResults) -> float | None:
    """Mean FID of real images; None if it was not measured."""
    floor = results.get("floor")
    return None if floor is None else float(floor["fid"]["mean"])


def title_of(results: EvaluationResults) -> str:
    """Captions, real images and features; empty for results of version 0.1."""
    return str(results["protocol"].get("title", ""))


def best_point(results: EvaluationResults, name: str) -> dict[str, Any] | None:
    """The point of a contender at the guidance chosen on the tuning captions; None without tuning."""
    curve = results["curves"][name]
    return next((point for point in curve["points"] if point["w"] == curve.get("best_w")), None)
