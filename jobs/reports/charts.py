"""Curves and bars as SVG for a page: no pixels, no date, the same bytes for the same numbers."""

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
_FILLED = 0.84
"""Of a category's width, by its bars."""
_FAINT = 0.4
_MARKED = 12
"""Up to so many values of a logarithmic x are marked each."""

# The page's colours, for a chart that stands alone.
_COLORS = {
    "--ink": "#1f1d1a",
    "--muted": "#6d675e",
    "--rule": "#e2ddd3",
    "--series-1": "#1d5c72",
    "--series-2": "#b4632d",
    "--series-3": "#7a7468",
    "--series-4": "#6d4a83",
    "--series-5": "#4f7f3a",
    "--series-6": "#a8862a",
    "--series-7": "#b03a5b",
    "--series-8": "#3f6fc0",
    "--series-9": "#2f8f80",
}

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
        limit_name: what it is called there.
    """

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    log_x: bool = False
    log_y: bool = False
    limit: float | None = None
    limit_name: str = "floor"


@dataclass(frozen=True, kw_only=True)
class Bars:
    """A bar in each category.

    Attributes:
        name: said in the legend.
        values: one a category.
        color: which of the page's nine.
        faint: whether it is paler than others of its colour.
    """

    name: str
    values: Sequence[float]
    color: int = 1
    faint: bool = False


@dataclass(frozen=True, kw_only=True)
class BarChart:
    """Categories from left to right, in each a bar of each kind side by side.

    Attributes:
        title: said above the picture.
        y_label: with its unit.
        categories: their names.
        bars: at least one.
    """

    title: str
    y_label: str
    categories: Sequence[str]
    bars: tuple[Bars, ...]


def chart_svg(chart: Chart | BarChart) -> str:
    """The chart as an `<svg>` element that takes its colours from the page.

    Raises:
        ValueError: if there are no series, more than nine, or one whose x and y differ in length; likewise
            of bars and categories.
    """
    _check(chart)
    with mpl.rc_context({**_STYLE, "svg.hashsalt": chart.title}):
        beside = _LEGEND_INCHES if isinstance(chart, Chart) and len(chart.series) > _INSIDE else 0.0
        figure = Figure(figsize=(_WIDTH_INCHES + beside, _HEIGHT_INCHES), layout="constrained")
        figure.patch.set_visible(False)
        if isinstance(chart, BarChart):
            _draw_bars(figure, chart)
        else:
            _draw(figure, chart)
        buffer = io.StringIO()
        # Without these entries matplotlib writes when and by what it was drawn.
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return _for_page(buffer.getvalue())


def standalone_svg(chart: Chart | BarChart) -> bytes:
    """The chart as a file of its own: black on nothing, in the colours of the page by daylight."""
    style = ";".join(f"{name}:{value}" for name, value in _COLORS.items())
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" style="{style}" font-family="sans-serif" '
    return chart_svg(chart).replace("<svg ", opening, 1).encode()


def _check(chart: Chart | BarChart) -> None:
    if isinstance(chart, BarChart):
        _check_bars(chart)
        return
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


def _check_bars(chart: BarChart) -> None:
    if not chart.bars or not chart.categories:
        raise ValueError(
            f"chart {chart.title!r} has {len(chart.bars)} bars in each of {len(chart.categories)} "
            "categories; at least one of both is needed"
        )
    for bars in chart.bars:
        if len(bars.values) != len(chart.categories) or not 1 <= bars.color <= len(_SERIES):
            raise ValueError(
                f"bars {bars.name!r} have {len(bars.values)} values for {len(chart.categories)} categories "
                f"and colour {bars.color}; as many, and a colour from 1 to {len(_SERIES)}, are needed"
            )


def _draw_bars(figure: Figure, chart: BarChart) -> None:
    axes = figure.add_subplot()
    axes.patch.set_visible(False)
    colors, width = list(_SERIES), _FILLED / len(chart.bars)
    for number, bars in enumerate(chart.bars):
        left = width * (number - (len(chart.bars) - 1) / 2)
        axes.bar(
            [place + left for place in range(len(chart.categories))],
            bars.values,
            width=0.9 * width,
            color=colors[bars.color - 1],
            alpha=_FAINT if bars.faint else 1.0,
            label=_plain(bars.name),
        )
    axes.set_xticks(range(len(chart.categories)), [_plain(name) for name in chart.categories])
    axes.set_xlim(-0.5, len(chart.categories) - 0.5)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.set_ylabel(_plain(chart.y_label))
    if len(chart.bars) > 1:
        figure.legend(
            frameon=False, labelcolor=_INK, fontsize=10, handlelength=1.0, loc="outside upper left", ncols=2
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
            f"{chart.limit_name} {chart.limit:g}",
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
