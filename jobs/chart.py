"""Curves as SVG for a page: no pixels, no date, the same bytes for the same numbers."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import (
    EngFormatter,
    FixedLocator,
    LogLocator,
    MaxNLocator,
    NullLocator,
    StrMethodFormatter,
)

_WIDTH_INCHES, _HEIGHT_INCHES = 5.2, 3.0
_LEGEND_INCHES = 1.3
# Drawn in colours that nothing else has, then handed to the page's style sheet, which knows light from dark.
_ROLES = {"#010101": "var(--ink)", "#020202": "var(--muted)", "#030303": "var(--rule)"}
_SERIES = {f"#0{n:x}0{n:x}0{n:x}": f"var(--series-{n - 3})" for n in range(4, 13)}
_INSIDE = 6
"""More lines than these are named beside the axes."""
_NEAR = 100
"""A logarithmic y that spans less is marked three times a decade."""
_MARKED = 12
"""Up to so many values of a logarithmic x are marked each."""

_INK, _MUTED, _RULE = _ROLES
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text, in the page's own letters
    "font.size": 10.5,
    "axes.edgecolor": _RULE,
    "axes.labelcolor": _MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "grid.color": _RULE,
    "grid.linewidth": 0.6,
    "xtick.color": _RULE,
    "ytick.color": _RULE,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _MUTED,
    "ytick.major.size": 0,
    "xtick.major.size": 3,
}


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line: its name, and as many x as y."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Up to nine lines on common axes.

    Attributes:
        title: said above the picture.
        x_label: with its unit.
        y_label: with its unit.
        series: at least one; each named at its end if there are several.
        log_x: whether x is drawn by its logarithm; a few values are marked each.
        log_y: whether y is drawn by its logarithm.
        limit: a level to be reached, drawn as a dashed line; None for none.
    """

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    log_x: bool = False
    log_y: bool = False
    limit: float | None = None


def chart_svg(chart: Chart) -> str:
    """The chart as an `<svg>` element that takes its colours from the page.

    Raises:
        ValueError: if there are no series, more than nine, or one whose x and y differ in length.
    """
    _check(chart)
    with mpl.rc_context({**_STYLE, "svg.hashsalt": chart.title}):
        beside = _LEGEND_INCHES if len(chart.series) > _INSIDE else 0.0
        figure = Figure(figsize=(_WIDTH_INCHES + beside, _HEIGHT_INCHES), layout="constrained")
        figure.patch.set_visible(False)
        _draw(figure, chart)
        buffer = io.StringIO()
        # Without these entries matplotlib writes when and by what it was drawn.
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return _for_page(buffer.getvalue())


def _check(chart: Chart) -> None:
    if not 1 <= len(chart.series) <= len(_SERIES):
        raise ValueError(
            f"chart {chart.title!r} has {len(chart.series)} series; 1 to {len(_SERIES)} are accepted"
        )
    for series in chart.series:
        if len(series.x) != len(series.y) or len(series.x) == 0:
            raise ValueError(
                f"series {series.name!r} has {len(series.x)} x and {len(series.y)} y; "
                "as many of both are needed, and at least one"
            )


def _draw(figure: Figure, chart: Chart) -> None:
    axes = figure.add_subplot()
    axes.patch.set_visible(False)
    for color, series in zip(_SERIES, chart.series, strict=False):
        marker = "o" if len(series.x) < 30 else None
        axes.plot(
            series.x,
            series.y,
            color=color,
            linewidth=1.6,
            marker=marker,
            markersize=3.5,
            label=_plain(series.name),
        )
    if chart.limit is not None:
        axes.axhline(chart.limit, color=_MUTED, linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(
            f"floor {chart.limit:g}",
            (0, chart.limit),
            xycoords=("axes fraction", "data"),
            color=_MUTED,
            ha="left",
            va="bottom",
            xytext=(3, 2),
            textcoords="offset points",
            fontsize=9.5,
        )
    if chart.log_y:
        axes.set_yscale("log")
        values = [y for series in chart.series for y in series.y if y > 0]
        near = bool(values) and max(values) < _NEAR * min(values)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if near else (1,)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5))
    if chart.log_x:
        axes.set_xscale("log")
        values = sorted({x for series in chart.series for x in series.x})
        few = len(values) <= _MARKED
        axes.xaxis.set_major_locator(FixedLocator(values) if few else LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(axis="y")
    axes.tick_params(which="minor", length=0)
    axes.set_xlabel(_plain(chart.x_label))
    axes.set_ylabel(_plain(chart.y_label))
    if len(chart.series) > 1:
        inside: dict[str, Any] = {} if len(chart.series) <= _INSIDE else {"loc": "outside right upper"}
        owner = figure if inside else axes
        owner.legend(frameon=False, labelcolor=_INK, fontsize=10, handlelength=1.4, **inside)


def _plain(text: str) -> str:
    # Between dollar signs matplotlib reads TeX.
    return text.replace("$", r"\$")


def _for_page(svg: str) -> str:
    """Strip what only a file of its own needs, and hand the colours to the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'\sxmlns(:xlink)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # two charts on a page would share these names
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg width="[^"]*" height="[^"]*"', '<svg role="img"', svg)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font-family: [^;\"]*;?", "", svg)
    for color, variable in {**_ROLES, **_SERIES}.items():
        svg = svg.replace(color, variable)
    return svg.strip()
