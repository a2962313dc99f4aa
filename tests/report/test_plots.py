import math
import re
import xml.etree.ElementTree as ET

import pytest

from prism_ray.report.intervals import Interval
from prism_ray.report.plots import Band, Bars, Line, histogram_plot, interval_plot, line_plot


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
    points = [(i, float(i % 2)) for i in range(9_600)]
    drawn = path_of(line_plot([Line("a", points, 0)]))
    assert 80 <= len(drawn) <= 160
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


def test_a_long_run_stays_light_however_long_it_is():
    points = [(i, math.sin(i)) for i in range(100_000)]
    assert len(line_plot([Line("a", points, 0)])) < 15_000
    small = line_plot([Line("a", points, 0)], small=True)
    assert len(small) < 4000 and "<title>" not in small


def test_the_newest_point_can_always_be_read():
    svg = line_plot([Line("a", [(i, i) for i in range(1, 158)], 0)])
    assert "a, step 157: 157" in svg


def test_a_band_lies_between_its_curves_under_the_lines():
    band = Band([(1, 0.0, 2.0), (2, 1.0, 3.0)], 4)
    svg = line_plot([Line("middle", [(1, 1.0), (2, 2.0)], 4)], bands=[band])
    ET.fromstring(svg)
    assert svg.index('class="band"') < svg.index('stroke="var(--c4)"')
    corners = [float(y) for y in re.findall(r"[\d.]+ ([\d.]+)", re.findall(r'class="band" d="M([^"]*)Z"', svg)[0])]
    first_high, last_high, last_low, first_low = corners
    (_, _, first), (_, _, last) = path_of(svg.replace('<path class="band" d', "<no d"))
    assert first_high < first < first_low and last_high < last < last_low


def test_a_band_with_holes_or_of_one_step_is_drawn_as_far_as_it_goes():
    for points in ([(1, math.nan, 2.0), (2, 1.0, 3.0)], [(1, 0.0, 2.0)], []):
        ET.fromstring(line_plot([Line("a", [(1, 1.0), (2, 2.0)], 0)], bands=[Band(points, 1)]))


def test_a_taller_bin_is_a_higher_bar():
    svg = histogram_plot([Bars("a <b>", [0.25, 0.5, 0.25], 0)], -1.0, 2.0, "score")
    ET.fromstring(svg)
    path = re.findall(r'class="area" d="([^"]*)"', svg)[0]
    heights = [float(y) for y in re.findall(r"L[\d.]+ ([\d.]+)", path)]
    assert heights[0] == heights[1] > heights[2] == heights[3] < heights[4] and "a &lt;b&gt;" in svg


def test_an_empty_histogram_is_still_a_picture():
    ET.fromstring(histogram_plot([Bars("a", [0.0, 0.0], 0)], 0.0, 1.0, "score"))


def ticks(plot):
    return [float(text) for text in re.findall(r'text-anchor="end">([^<]+)<', plot)]


def test_what_never_happened_is_a_line_at_zero_without_numbers_below_it():
    assert min(ticks(line_plot([Line("a", [(1, 0.0), (2, 0.0)], 0)]))) == 0
    assert min(ticks(line_plot([Line("a", [(1, -2.0), (2, -2.0)], 0)]))) < -1


def test_a_share_is_shown_from_nothing_to_all():
    points = [(1, 0.5), (2, 0.6)]
    assert min(ticks(line_plot([Line("a", points, 0)]))) > 0.4
    shown = ticks(line_plot([Line("a", points, 0)], share=True))
    assert (min(shown), max(shown)) == (0, 1)
