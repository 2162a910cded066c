"""Charts: SVG for a page, the same for the same numbers."""

import xml.etree.ElementTree as ElementTree

import pytest

from jobs.reports.charts import BarChart, Bars, Chart, Series, chart_svg, standalone_svg

LINES = (Series(name="one", x=[0, 1, 2], y=[3.0, 2.0, 1.5]), Series(name="two", x=[0, 2], y=[1.0, 4.0]))
BARS = (
    Bars(name="before", values=[3.0, 2.0], faint=True),
    Bars(name="$after$", values=[1.0, 0.0]),
    Bars(name="other", values=[2.0, 4.0], color=2),
)


def chart(**changes):
    return Chart(**{"title": "Loss", "x_label": "step", "y_label": "error", "series": LINES, **changes})


def bars(**changes):
    values = {"title": "Time", "y_label": "ms", "categories": ["Down-1", "<Mid>"], "bars": BARS}
    return BarChart(**{**values, **changes})


def nodes(svg):
    return list(ElementTree.fromstring(svg).iter())


def texts(svg):
    return {node.text for node in nodes(svg) if node.tag == "text"}


def test_the_same_numbers_give_the_same_bytes():
    assert chart_svg(chart()) == chart_svg(chart())
    assert chart_svg(bars()) == chart_svg(bars())
    assert chart_svg(chart(title="Loss")) != chart_svg(chart(title="PSNR"))


def test_an_svg_names_its_lines_and_no_address():
    svg = chart_svg(chart(limit=2.5))
    assert {"one", "two", "step", "error", "floor 2.5"} <= texts(svg)
    assert "http" not in svg
    assert "xmlns" not in svg


@pytest.mark.parametrize("given", [chart(), bars()])
def test_colors_are_variables_of_the_page(given):
    svg = chart_svg(given)
    assert "var(--series-1)" in svg
    assert "var(--series-2)" in svg
    assert "#" not in svg.replace('href="#', "").replace("url(#", "")
    assert b"--series-1:#" in standalone_svg(given)


def test_two_charts_share_no_identifier():
    first, second = (
        {node.get("id") for node in nodes(chart_svg(chart(title=title))) if node.get("id")}
        for title in ("Loss", "PSNR")
    )
    assert first
    assert first.isdisjoint(second)


def test_labels_are_text_and_not_markup():
    lines = (Series(name="<script>", x=[0], y=[1]), Series(name="$x_1$", x=[0], y=[2]))
    assert {"<script>", "$x_1$"} <= texts(chart_svg(chart(series=lines)))


def test_six_lines_have_six_colors():
    svg = chart_svg(chart(series=tuple(Series(name=str(n), x=[1, 2], y=[n, 1]) for n in range(6))))
    assert all(f"var(--series-{number})" in svg for number in range(1, 7))


def test_a_logarithmic_x_is_marked_at_its_values():
    line = Series(name="DDIM", x=[2, 4, 50], y=[3, 2, 1])
    assert {"2", "4", "50"} <= texts(chart_svg(chart(series=(line,), log_x=True)))


def test_bars_are_named_and_faint_ones_paler():
    svg = chart_svg(bars())
    assert {"before", "$after$", "other", "ms", "Down-1", "<Mid>"} <= texts(svg)
    assert svg.count("fill: var(--series-1); opacity") == svg.count("fill: var(--series-2)") == 3
    assert svg.count("fill: var(--series-1)") == 6  # two bars and one of the legend, faint and not


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (bars(bars=()), "0 bars in each of 2 categories"),
        (bars(categories=[]), "3 bars in each of 0 categories"),
        (bars(categories=["one"]), "2 values for 1 categories"),
        (bars(bars=(Bars(name="a", values=[1, 2], color=10),)), "colour 10"),
        (chart(series=()), "0 series"),
        (chart(series=(Series(name="a", x=[1], y=[1]),) * 19), "19 series"),
        (chart(series=(Series(name="a", x=[1, 2], y=[1]),)), "2 x and 1 y"),
        (chart(series=(Series(name="a", x=[], y=[]),)), "0 x and 0 y"),
    ],
)
def test_invalid_charts_are_refused(given, reason):
    with pytest.raises(ValueError, match=reason):
        chart_svg(given)
