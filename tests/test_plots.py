"""The SVG curves: parsed as XML, their pixels turned back into values."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crpo_fast import plots

NS = {"svg": "http://www.w3.org/2000/svg"}


def parse(*args, **kwargs) -> ElementTree.Element:
    return ElementTree.fromstring(plots.line_plot(*args, **kwargs))


def pixels(node: ElementTree.Element) -> list[tuple[float, ...]]:
    return [tuple(map(float, pair.split(","))) for pair in node.attrib["points"].split()]


def text_at(root: ElementTree.Element, anchor: str) -> dict[str, tuple[float, float]]:
    """Text -> position, of the tick labels: those on the left end, those below are centred."""
    found = root.findall("svg:text", NS)
    return {
        node.text or "": (float(node.attrib["x"]), float(node.attrib["y"]))
        for node in found
        if node.attrib.get("text-anchor") == anchor
    }


def test_points_lie_where_the_ticks_say():
    points = [(0, 0.0), (10, 0.5), (20, 2.0), (40, 1.0)]
    root = parse({"reward": points}, "Reward", "step", "reward")
    (line,) = root.findall("svg:polyline", NS)
    ys, xs = text_at(root, "end"), text_at(root, "middle")
    x_of = {float(text): x for text, (x, _) in xs.items() if text != "step"}
    y_of = {float(text): y for text, (_, y) in ys.items()}
    assert sorted(x_of) == [0, 5, 10, 15, 20, 25, 30, 35, 40]
    assert sorted(y_of) == [0, 0.5, 1, 1.5, 2]
    assert pixels(line) == [(x_of[x], y_of[y]) for x, y in points]
    assert y_of[2] < y_of[0]  # upwards
    assert (x_of[0], x_of[40]) == (plots.LEFT, plots.WIDTH - plots.RIGHT)


def test_a_value_that_is_not_finite_breaks_the_line():
    points = [(0, 1.0), (1, 2.0), (2, math.nan), (3, 1.0), (4, math.inf), (5, 2.0), (6, 1.0)]
    root = parse({"kl": points}, "KL", "step", "nats")
    assert [len(pixels(line)) for line in root.findall("svg:polyline", NS)] == [2, 2]
    assert len(root.findall("svg:circle", NS)) == 1


def test_band_goes_along_low_and_back_along_high():
    band = [(0, 1.0, 3.0), (1, 0.0, 2.0), (2, math.nan, 1.0)]
    root = parse({"a": [(0, 2.0), (1, 1.0)]}, "t", "x", "y", {"a": band})
    (polygon,) = root.findall("svg:polygon", NS)
    y_of = {float(text): y for text, (_, y) in text_at(root, "end").items()}
    left, right = plots.LEFT, plots.WIDTH - plots.RIGHT
    expected = [(left, y_of[1]), (right, y_of[0]), (right, y_of[2]), (left, y_of[3])]
    assert pixels(polygon) == expected
    (line,) = root.findall("svg:polyline", NS)
    assert polygon.attrib["fill"] == line.attrib["stroke"]
    with pytest.raises(ValueError, match=r"bands: expected names of series \(a\), got 'b'"):
        plots.line_plot({"a": []}, "t", "x", "y", {"b": band})


def test_text_is_escaped_and_described():
    series = {"<a> & b": [(0, 0.25), (1, 4.0)], "none": []}
    root = parse(series, "A < B", "step & time", "nats")
    assert root.findtext("svg:title", namespaces=NS) == "A < B"
    expected = "nats over step & time. <a> & b: from 0.25 to 4. none: no values."
    assert root.findtext("svg:desc", namespaces=NS) == expected
    legend = [node.text for node in root.findall("svg:text", NS)][-2:]
    assert legend == ["<a> & b", "none"]
    assert "prefers-color-scheme:dark" in (root.findtext("svg:style", namespaces=NS) or "")


def test_a_long_legend_wraps_and_moves_the_drawing_down():
    few = parse({"a": [(0, 0.0), (1, 1.0)], "b": []}, "t", "x", "y")
    names = [f"a rather long name {index}" for index in range(8)]
    many = parse({name: [(0, 0.0), (1, 1.0)] for name in names}, "t", "x", "y")
    swatches = many.findall("svg:rect", NS)[1:]
    assert len(swatches) == 8
    assert len({node.attrib["fill"] for node in swatches}) == 8
    assert max(float(node.attrib["x"]) for node in swatches) < plots.WIDTH - 100
    lowest = max(float(node.attrib["y"]) for node in swatches)
    top = min(y for line in many.findall("svg:polyline", NS) for _, y in pixels(line))
    assert lowest < top
    assert top > min(y for line in few.findall("svg:polyline", NS) for _, y in pixels(line))


@pytest.mark.parametrize(
    ("span", "step"), [(1.0, 0.2), (8.0, 1.0), (59.0, 10.0), (0.013, 0.002), (3e6, 5e5), (1.7, 0.5)]
)
def test_steps_are_round(span, step):
    assert plots.nice_step(span) == pytest.approx(step)


@pytest.mark.parametrize("points", [[], [(0, 3.0), (1, 3.0)], [(5, 0.0)], [(0, math.nan)]])
def test_empty_and_constant_series_are_drawn(points):
    root = parse({"a": points}, "t", "x", "y")
    assert len(text_at(root, "end")) >= 3


@given(st.lists(st.tuples(st.floats(), st.floats()), max_size=20))
def test_any_numbers_give_coordinates_on_the_page(points):
    root = parse({"a": points}, "t", "x", "y")
    for line in root.findall("svg:polyline", NS):
        for x, y in pixels(line):
            assert plots.LEFT <= x <= plots.WIDTH - plots.RIGHT
            assert 0 <= y <= plots.HEIGHT - plots.BOTTOM


def test_write_svg_makes_the_folder(tmp_path):
    series = {"a": [(0.0, 1.0), (1.0, 2.0)]}
    path = plots.write_svg(tmp_path / "plots" / "a.svg", series, "t", "x", "y")
    assert path.read_text(encoding="utf-8") == plots.line_plot(series, "t", "x", "y")
