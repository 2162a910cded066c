"""Renders line and bar charts as SVG for a page: no pixels, no date, the same bytes for the same numbers."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import matplotlib as mpl
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_WIDTH_INCHES, _HEIGHT_INCHES = 5.2, 3.0
_LEGEND_INCHES = 1.3
# matplotlib draws in these placeholder colours, which are replaced by variables of the page's style sheet:
# only the page knows whether it is light or dark.
_ROLES = {"#010101": "var(--ink)", "#020202": "var(--muted)", "#030303": "var(--rule)"}
_SERIES = {f"#0{n:x}0{n:x}0{n:x}": f"var(--series-{n - 3})" for n in range(4, 13)}
_LINE_STYLES = ("solid", "dotted")
"""Lines beyond the colours take them once more."""
_MAX_INSIDE = 6
"""With more lines than this the legend stands beside the axes."""
_NARROW_SPAN = 100
"""A logarithmic y axis that spans a smaller factor has three ticks per decade."""
_BARS_WIDTH = 0.84
"""Share of a category's width that its bars fill."""
_FAINT_ALPHA = 0.4
_MAX_TICKS = 12
"""A logarithmic x axis with at most this many values has a tick at each."""

# The colours of the light page, for a chart in a file of its own.
_PALETTE = (
    *("#1d5c72", "#b4632d", "#7a7468", "#6d4a83", "#4f7f3a"),
    *("#a8862a", "#b03a5b", "#3f6fc0", "#2f8f80"),
)
_COLORS = {
    **{"--ink": "#1f1d1a", "--muted": "#6d675e", "--rule": "#e2ddd3"},
    **{f"--series-{number}": color for number, color in enumerate(_PALETTE, start=1)},
}
_SEPARATE = re.compile(
    r'\sxmlns(?::xlink)?="[^"]*"|<metadata>.*?</metadata>|<style.*?</style>|font-family: [^;"]*;?', re.DOTALL
)
"""What only a file of its own needs."""

_INK, _MUTED, _RULE = _ROLES
_LEGEND: dict[str, Any] = {"frameon": False, "labelcolor": _INK, "fontsize": 10}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text, in the page's font
    "font.size": 10.5,
    **dict.fromkeys(("axes.edgecolor", "grid.color", "xtick.color", "ytick.color"), _RULE),
    **dict.fromkeys(("axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), _MUTED),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "axes.spines.left"), False),
    "axes.linewidth": 0.8,
    "grid.linewidth": 0.6,
    "ytick.major.size": 0,
    "xtick.major.size": 3,
}


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a chart; x and y have the same length."""

    name: str
    x: Sequence[float]
    y: Sequence[float]

    @classmethod
    def of(cls, name: str, points: Sequence[Mapping[str, Any]], *, x: str, y: str) -> Series:
        """A line through those points that have a `y`; of a value with its interval the value."""
        known = [point for point in points if y in point]
        return cls(
            name=name, x=[_value(point[x]) for point in known], y=[_value(point[y]) for point in known]
        )


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Up to nine lines on common axes.

    Attributes:
        title: shown above the chart.
        x_label: with its unit.
        y_label: with its unit.
        series: at least one; several are named in a legend.
        log_x: whether the x axis is logarithmic.
        log_y: whether the y axis is logarithmic.
        limit: level of a dashed line; None for no line.
        limit_name: its label.
        note: in small print within the chart, such as what it was measured on.
    """

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    log_x: bool = False
    log_y: bool = False
    limit: float | None = None
    limit_name: str = "floor"
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Bars:
    """One bar in each category.

    Attributes:
        name: in the legend.
        values: one per category.
        color: index from 1 of the page's nine colours.
        faint: whether it is paler than the others of its colour.
    """

    name: str
    values: Sequence[float]
    color: int = 1
    faint: bool = False


@dataclass(frozen=True, kw_only=True)
class BarChart:
    """Categories from left to right, each with its bars side by side.

    Attributes:
        title: shown above the chart.
        y_label: with its unit.
        categories: their names.
        bars: at least one.
    """

    title: str
    y_label: str
    categories: Sequence[str]
    bars: tuple[Bars, ...]


def _value(number: float | Sequence[float]) -> float:
    return number[0] if isinstance(number, Sequence) else number


def chart_svg(chart: Chart | BarChart) -> str:
    """The chart as an `<svg>` element that takes its colours from the page.

    Raises:
        ValueError: if there are no series, more than nine, or one whose x and y differ in length; likewise
            for bars and categories.
    """
    _check(chart)
    many = isinstance(chart, Chart) and len(chart.series) > _MAX_INSIDE
    size = (_WIDTH_INCHES + (_LEGEND_INCHES if many else 0.0), _HEIGHT_INCHES)
    with mpl.rc_context({**_STYLE, "svg.hashsalt": chart.title}):
        figure = Figure(figsize=size, layout="constrained")
        figure.patch.set_visible(False)
        axes = figure.add_subplot()
        axes.patch.set_visible(False)
        axes.grid(axis="y")
        if isinstance(chart, BarChart):
            _draw_bars(figure, axes, chart)
        else:
            _draw_lines(figure, axes, chart)
        buffer = io.StringIO()
        # Without these entries matplotlib writes its version and the date, which differ between runs.
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return _for_page(buffer.getvalue())


def standalone_svg(chart: Chart | BarChart) -> bytes:
    """The chart as an SVG file of its own, transparent, in the colours of the light page."""
    style = ";".join(f"{name}:{value}" for name, value in _COLORS.items())
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" style="{style}" font-family="sans-serif" '
    return chart_svg(chart).replace("<svg ", opening, 1).encode()


def _check(chart: Chart | BarChart) -> None:
    if isinstance(chart, BarChart):
        count = len(chart.categories)
        if not chart.bars or not count:
            raise ValueError(
                f"chart {chart.title!r} has {len(chart.bars)} bars in each of {count} categories; at least "
                "one of both is needed"
            )
        for bars in chart.bars:
            if len(bars.values) != count or not 1 <= bars.color <= len(_SERIES):
                raise ValueError(
                    f"bars {bars.name!r} have {len(bars.values)} values for {count} categories and colour "
                    f"{bars.color}; one value per category and a colour from 1 to {len(_SERIES)} are accepted"
                )
        return
    most = len(_SERIES) * len(_LINE_STYLES)
    if not 1 <= len(chart.series) <= most:
        raise ValueError(f"chart {chart.title!r} has {len(chart.series)} series; 1 to {most} are accepted")
    for series in chart.series:
        if len(series.x) != len(series.y) or len(series.x) == 0:
            raise ValueError(
                f"series {series.name!r} has {len(series.x)} x and {len(series.y)} y; the same number of "
                "both, and at least one, is needed"
            )


def _draw_bars(figure: Figure, axes: Axes, chart: BarChart) -> None:
    colors, width = list(_SERIES), _BARS_WIDTH / len(chart.bars)
    for index, bars in enumerate(chart.bars):
        offset = width * (index - (len(chart.bars) - 1) / 2)
        axes.bar(
            [category + offset for category in range(len(chart.categories))],
            bars.values,
            width=0.9 * width,
            color=colors[bars.color - 1],
            alpha=_FAINT_ALPHA if bars.faint else 1.0,
            label=_plain(bars.name),
        )
    axes.set_xticks(range(len(chart.categories)), [_plain(name) for name in chart.categories])
    axes.set_xlim(-0.5, len(chart.categories) - 0.5)
    axes.yaxis.set_major_locator(ticker.MaxNLocator(5))
    axes.set_axisbelow(True)
    axes.set_ylabel(_plain(chart.y_label))
    if len(chart.bars) > 1:
        figure.legend(**_LEGEND, handlelength=1.0, loc="outside upper left", ncols=2)


def _draw_lines(figure: Figure, axes: Axes, chart: Chart) -> None:
    for (linestyle, color), series in zip(product(_LINE_STYLES, _SERIES), chart.series, strict=False):
        marker, name = "o" if len(series.x) < 30 else None, _plain(series.name)
        style: dict[str, Any] = {"color": color, "linestyle": linestyle, "linewidth": 1.6}
        axes.plot(series.x, series.y, **style, marker=marker, markersize=3.5, label=name)
    if chart.limit is not None:
        axes.axhline(chart.limit, color=_MUTED, linewidth=1, linestyle=(0, (4, 3)))
        label: dict[str, Any] = {"ha": "left", "va": "bottom", "color": _MUTED, "fontsize": 9.5}
        axes.annotate(
            f"{chart.limit_name} {chart.limit:g}",
            (0, chart.limit),
            xycoords=("axes fraction", "data"),
            xytext=(3, 2),
            textcoords="offset points",
            **label,
        )
    _set_scales(axes, chart)
    if chart.note:
        axes.set_title(_plain(chart.note), loc="left", fontsize=7.5, color=_MUTED)
    axes.set_xlabel(_plain(chart.x_label))
    axes.set_ylabel(_plain(chart.y_label))
    if len(chart.series) > _MAX_INSIDE:
        figure.legend(**_LEGEND, handlelength=1.4, loc="outside right upper")
    elif len(chart.series) > 1:
        axes.legend(**_LEGEND, handlelength=1.4)


def _set_scales(axes: Axes, chart: Chart) -> None:
    if chart.log_y:
        axes.set_yscale("log")
        values = [y for series in chart.series for y in series.y if y > 0]
        narrow = bool(values) and max(values) < _NARROW_SPAN * min(values)
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if narrow else (1,)))
        axes.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_locator(ticker.NullLocator())
    else:
        axes.yaxis.set_major_locator(ticker.MaxNLocator(5))
    if chart.log_x:
        axes.set_xscale("log")
        ticks = sorted({x for series in chart.series for x in series.x})
        few = len(ticks) <= _MAX_TICKS
        axes.xaxis.set_major_locator(ticker.FixedLocator(ticks) if few else ticker.LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(ticker.NullLocator())
    else:
        axes.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    axes.tick_params(which="minor", length=0)


def _plain(text: str) -> str:
    # matplotlib reads text between dollar signs as TeX.
    return text.replace("$", r"\$")


def _for_page(svg: str) -> str:
    """Remove what only a separate file needs, and replace placeholder colours by variables of the page."""
    svg = _SEPARATE.sub("", svg[svg.index("<svg") :]).replace("xlink:href", "href")
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # two charts on a page would share these identifiers
    svg = re.sub(r'<svg width="[^"]*" height="[^"]*"', '<svg role="img"', svg)
    for color, variable in {**_ROLES, **_SERIES}.items():
        svg = svg.replace(color, variable)
    return svg.strip()
