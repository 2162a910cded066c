"""What an evaluation found, as charts and as a page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jobs.reports.charts import Chart, Series
from jobs.reports.page import render_page

_MAX_OTHERS = 5
"""Lines beside the baseline's on one chart."""


def render_evaluation(results: Mapping[str, Any]) -> str:
    """The page as text, from what `jobs.evaluation.evaluation.evaluate` returns."""
    return render_page("evaluation.html.j2", results=results, charts=evaluation_charts(results))


def evaluation_charts(results: Mapping[str, Any]) -> list[Chart]:
    """CLIP over FID along guidance, and FID over guidance; each with the baseline and up to five others."""
    charts = []
    for number, names in enumerate(_name_groups(results)):
        part = f" ({number + 1})" if number else ""
        charts.append(
            Chart(
                title=f"CLIP over FID, along guidance{part}",
                x_label="FID",
                y_label="CLIP",
                series=tuple(_series(results, name, x="fid", y="clip") for name in names),
            )
        )
        charts.append(
            Chart(
                title=f"FID over guidance{part}",
                x_label="guidance w",
                y_label="FID",
                series=tuple(_series(results, name, x="w", y="fid") for name in names),
            )
        )
    return charts


def _name_groups(results: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    baseline = results["baseline"]
    others = [name for name in results["curves"] if name != baseline]
    for start in range(0, max(len(others), 1), _MAX_OTHERS):
        yield [baseline, *others[start : start + _MAX_OTHERS]]


def _series(results: Mapping[str, Any], name: str, *, x: str, y: str) -> Series:
    points = results["curves"][name]["points"]

    def values(key: str) -> list[float]:
        return [point[key] if key == "w" else point[key][0] for point in points]

    return Series(name=name, x=values(x), y=values(y))
