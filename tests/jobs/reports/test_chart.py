"""Charts: SVG that belongs into a page, the same for the same numbers."""

import xml.etree.ElementTree as ElementTree

import pytest

from jobs.reports.charts import BarChart, Bars, Chart, Series, chart_svg, standalone_svg


def chart(**changes):
    lines = (Series(name="one", x=[0, 1, 2], y=[3.0, 2.0, 1.5]), Series(name="two", x=[0, 2], y=[1.0, 4.0]))
    return Chart(**{"title": "Loss", "x_label": "step", "y_label": "error", "series": lines, **changes})


def test_the_same_numbers_give_the_same_bytes():
    assert chart_svg(chart()) == chart_svg(chart())
    assert chart_svg(chart(title="Loss")) != chart_svg(chart(title="PSNR"))


def test_an_svg_is_wellformed_names_its_lines_and_no_address():
    svg = chart_svg(chart(limit=2.5))
    texts = [node.text for node in ElementTree.fromstring(svg).iter("text")]
    assert {"one", "two", "step", "error", "floor 2.5"} <= set(texts)
    assert "http" not in svg
    assert "xmlns" not in svg


def test_colors_are_the_pages():
    svg = chart_svg(chart())
    assert "var(--series-1)" in svg
    assert "var(--series-2)" in svg
    assert "#" not in svg.replace('href="#', "").replace("url(#", "")


def test_two_charts_share_no_identifier():
    first, second = (
        {
            node.get("id")
            for node in ElementTree.fromstring(chart_svg(chart(title=title))).iter()
            if node.get("id")
        }
        for title in ("Loss", "PSNR")
    )
    assert first
    assert first.isdisjoint(second)


def test_labels_are_text_and_not_markup():
    lines = (Series(name="<script>", x=[0], y=[1]), Series(name="$x_1$", x=[0], y=[2]))
    texts = [node.text for node in ElementTree.fromstring(chart_svg(chart(series=lines))).iter("text")]
    assert {"<script>", "$x_1$"} <= set(texts)


def test_six_lines_have_six_colors_of_the_page():
    lines = tuple(Series(name=str(number), x=[1, 2], y=[number, 1]) for number in range(6))
    svg = chart_svg(chart(series=lines))
    assert all(f"var(--series-{number})" in svg for number in range(1, 7))


def test_a_logarithmic_x_is_marked_at_its_values():
    line = Series(name="DDIM", x=[2, 4, 50], y=[3, 2, 1])
    svg = ElementTree.fromstring(chart_svg(chart(series=(line,), log_x=True)))
    assert {"2", "4", "50"} <= {node.text for node in svg.iter("text")}


def bars(**changes):
    kinds = (
        Bars(name="before", values=[3.0, 2.0], faint=True),
        Bars(name="$after$", values=[1.0, 0.0]),
        Bars(name="other", values=[2.0, 4.0], color=2),
    )
    values = {"title": "Time", "y_label": "ms", "categories": ["Down-1", "<Mid>"], "bars": kinds}
    return BarChart(**{**values, **changes})


def test_bars_are_drawn_in_the_pages_colors_and_named():
    svg = chart_svg(bars())
    root = ElementTree.fromstring(svg)
    assert {"before", "$after$", "other", "ms", "Down-1", "<Mid>"} <= {
        node.text for node in root.iter("text")
    }
    assert svg.count("fill: var(--series-1); opacity") == svg.count("fill: var(--series-2)") == 3
    assert svg.count("fill: var(--series-1)") == 6  # two bars and one of the legend, faint and not
    assert "#" not in svg.replace('href="#', "").replace("url(#", "")
    assert chart_svg(bars()) == svg
    assert b"--series-1:#" in standalone_svg(bars())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"bars": ()}, "0 bars in each of 2 categories"),
        ({"categories": []}, "3 bars in each of 0 categories"),
        ({"categories": ["one"]}, "have 2 values for 1 categories"),
        (
            {"bars": (Bars(name="a", values=[1, 2], color=10),)},
            "colour 10; as many, and a colour from 1 to 9",
        ),
    ],
)
def test_bars_that_cannot_be_drawn_are_refused(changes, reason):
    with pytest.raises(ValueError, match=reason):
        chart_svg(bars(**changes))


@pytest.mark.parametrize(
    ("series", "reason"),
    [
        ((), "0 series"),
        ((Series(name="a", x=[1], y=[1]),) * 10, "10 series"),
        ((Series(name="a", x=[1, 2], y=[1]),), "2 x and 1 y"),
        ((Series(name="a", x=[], y=[]),), "0 x and 0 y"),
    ],
)
def test_what_cannot_be_drawn_is_refused(series, reason):
    with pytest.raises(ValueError, match=reason):
        chart_svg(chart(series=series))
