"""Renders the results of an evaluation as charts and as a page."""

from collections.abc import Iterator

from jobs.evaluation.results import EvaluationResults
from jobs.reports.charts import Chart, Series
from jobs.reports.page import render_page

_MAX_OTHERS = 5
"""Contenders beside the baseline on one chart."""


def render_evaluation(results: EvaluationResults) -> str:
    """The page as text, from what `jobs.evaluation.evaluation.evaluate` returns."""
    return render_page("evaluation.html.j2", results=results, charts=list(evaluation_charts(results)))


def evaluation_charts(results: EvaluationResults) -> Iterator[Chart]:
    """CLIP over FID and FID over guidance, each with the baseline and up to five other contenders."""
    baseline = results["baseline"]
    others = [name for name in results["curves"] if name != baseline]
    for number, start in enumerate(range(0, max(len(others), 1), _MAX_OTHERS)):
        names = [baseline, *others[start : start + _MAX_OTHERS]]
        part = f" ({number + 1})" if number else ""
        for title, x, y, x_label, y_label in (
            ("CLIP over FID, along guidance", "fid", "clip", "FID", "CLIP"),
            ("FID over guidance", "w", "fid", "guidance w", "FID"),
        ):
            curves = {name: results["curves"][name]["points"] for name in names}
            series = tuple(Series.of(name, points, x=x, y=y) for name, points in curves.items())
            yield Chart(title=f"{title}{part}", x_label=x_label, y_label=y_label, series=series)
