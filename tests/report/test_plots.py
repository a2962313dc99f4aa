import math
import re
import xml.etree.ElementTree as ET

import pytest

from prism_ray.report.intervals import Interval
from prism_ray.report.plots import Line, interval_plot, line_plot


def path_of(svg: str, number: int = 0) -> list[tuple[str, float, float]]:
    found = re.findall(r'<path d="([^"]*)"', svg)[number]
    return [(m[0], float(m[1]), float(m[2])) for m in re.findall(r"([ML])([-\d.]+) ([-\d.]+)", found)]


@pytest.mark.parametrize(
    "values", [[0.0, 1.0, 0.5], [7.0, 7.0], [3.0], [0.0, 0.0], [-1e-9, 1e-9], [1e9, -1e12], [math.nan, 2.0, math.inf]]
)
def test_every_series_gives_well_formed_svg_inside_its_frame(values):
    svg = line_plot([Line("a < b & c", list(enumerate(values)), 0)], reference=0.5)
    ET.fromstring(svg)
    for _, x, y in path_of(svg):
        assert 0 <= x <= 460 and 0 <= y <= 230


def test_greater_values_are_drawn_higher_and_later_steps_further_right():
    (_, x0, y0), (_, x1, y1) = path_of(line_plot([Line("a", [(1, 0.0), (2, 5.0)], 0)]))
    assert x1 > x0 and y1 < y0


def test_a_value_that_is_not_finite_leaves_a_gap():
    points = [(1, 0.0), (2, 1.0), (3, math.nan), (4, 1.0), (5, 2.0)]
    assert [pen for pen, _, _ in path_of(line_plot([Line("a", points, 0)]))] == ["M", "L", "M", "L"]


def test_nothing_finite_says_so():
    assert "no finite values" in line_plot([Line("a", [(1, math.nan)], 0)])


def test_a_long_run_is_thinned_to_means():
    points = [(i, float(i % 2)) for i in range(10_000)]
    drawn = path_of(line_plot([Line("a", points, 0)]))
    assert 100 <= len(drawn) <= 240
    assert len({y for _, _, y in drawn}) == 1, "means over even stretches of 0, 1, 0, 1 are all a half"


def test_lines_keep_their_colours_and_dashes():
    svg = line_plot([Line("a", [(1, 0), (2, 1)], 3), Line("b", [(1, 1), (2, 2)], 9, dashed=True)])
    assert 'stroke="var(--c3)" stroke-width="2"/>' in svg
    assert 'stroke="var(--c1)" stroke-width="2" stroke-dasharray' in svg


def test_intervals_are_drawn_with_their_numbers():
    svg = interval_plot([("a<b", Interval(0.5, 0.4, 0.6), Interval(0.7, 0.6, 0.8))], ("sampled", "greedy"))
    ET.fromstring(svg)
    assert "a&lt;b, sampled: 0.500 (0.400 to 0.600)" in svg and "a&lt;b, greedy: 0.700" in svg
    assert interval_plot([], ("x", "y")) == ""
