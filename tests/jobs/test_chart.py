"""Charts: SVG that belongs into a page, the same for the same numbers."""

import xml.etree.ElementTree as ElementTree

import pytest

from jobs.chart import Chart, Series, chart_svg


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


@pytest.mark.parametrize(
    ("series", "reason"),
    [
        ((), "0 series"),
        ((Series(name="a", x=[1], y=[1]),) * 4, "4 series"),
        ((Series(name="a", x=[1, 2], y=[1]),), "2 x and 1 y"),
        ((Series(name="a", x=[], y=[]),), "0 x and 0 y"),
    ],
)
def test_what_cannot_be_drawn_is_refused(series, reason):
    with pytest.raises(ValueError, match=reason):
        chart_svg(chart(series=series))
