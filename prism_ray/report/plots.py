"""Small plots as inline SVG: lines and bands over steps, histograms, estimates with intervals; pure, no script.

Colours are the page's CSS variables `--c0` … `--c7`, so that both light and dark pages work. Points carry a `<title>`,
which browsers show on hovering.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from prism_ray.report.intervals import Interval

COLOURS = 8
_WIDTH, _HEIGHT = 460, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 10, 34
_MOST_POINTS = 160
_MOST_TITLES = 40


@dataclass(frozen=True)
class Line:
    """One line of a plot: (step, value) points, in order; a value that is not finite leaves a gap."""

    label: str
    points: Sequence[tuple[float, float]]
    colour: int
    dashed: bool = False


@dataclass(frozen=True)
class Band:
    """An area of a plot between two curves: (step, low, high) points, in order."""

    points: Sequence[tuple[float, float, float]]
    colour: int


def line_plot(
    lines: Sequence[Line],
    reference: float | None = None,
    x_label: str = "step",
    bands: Sequence[Band] = (),
    small: bool = False,
    share: bool = False,
) -> str:
    """The lines over common axes, over their `bands`; `reference` draws a thin horizontal line there (chance level,
    zero). `small` draws them coarser and without what is shown on hovering; of a `share` all from 0 to 1 is shown."""
    most = _MOST_POINTS // 2 if small else _MOST_POINTS
    thinned = [(line, _thin(line.points, most)) for line in lines]
    areas = [(band, _thin_band(band, most)) for band in bands]
    finite = [(x, y) for _, points in thinned for x, y in points if math.isfinite(y)]
    if not finite:
        return '<p class="none">no finite values</p>'
    xs, ys = [x for x, _ in finite], [y for _, y in finite]
    x_axis = _Axis(min(xs), max(xs), _LEFT, _WIDTH - _RIGHT)
    levels = [*ys, *([reference] if reference is not None else []), *((0.0, 1.0) if share else ())]
    levels += [y for _, points in areas for _, low, high in points for y in (low, high)]
    y_axis = _Axis(min(levels), max(levels), _HEIGHT - _BOTTOM, _TOP, pad=0.06)
    parts = [_frame(x_axis, y_axis, x_label)]
    if reference is not None:
        y = y_axis(reference)
        parts.append(f'<line class="reference" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
    parts += [_area(points, band.colour, x_axis, y_axis) for band, points in areas]
    parts += [_drawn(line, points, x_axis, y_axis, 0 if small else _MOST_TITLES) for line, points in thinned]
    names = escape(", ".join(line.label for line in lines))
    head = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{names}">'
    return head + "".join(parts) + "</svg>"


@dataclass(frozen=True)
class Bars:
    """One histogram: the share in each of the bins, which are as wide as one another."""

    label: str
    shares: Sequence[float]
    colour: int


def histogram_plot(bars: Sequence[Bars], low: float, high: float, x_label: str) -> str:
    """Histograms over common bins from `low` to `high`, one over the other."""
    tallest = max((share for each in bars for share in each.shares), default=0.0)
    x_axis = _Axis(low, high, _LEFT, _WIDTH - _RIGHT)
    y_axis = _Axis(0.0, tallest or 1.0, _HEIGHT - _BOTTOM, _TOP)
    parts = [_frame(x_axis, y_axis, x_label, whole=False)]
    for each in bars:
        width = (high - low) / len(each.shares)
        path, colour = [f"M{x_axis(low):.1f} {y_axis(0):.1f}"], f"var(--c{each.colour % COLOURS})"
        for number, share in enumerate(each.shares):
            left, right = x_axis(low + number * width), x_axis(low + (number + 1) * width)
            path.append(f"L{left:.1f} {y_axis(share):.1f}L{right:.1f} {y_axis(share):.1f}")
        path.append(f"L{x_axis(high):.1f} {y_axis(0):.1f}Z")
        title = f"<title>{escape(each.label)}</title>"
        parts.append(f'<path class="area" d="{"".join(path)}" fill="{colour}" stroke="{colour}">{title}</path>')
    names = escape(", ".join(each.label for each in bars))
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{names}">' + "".join(parts) + "</svg>"


def interval_plot(rows: Sequence[tuple[str, Interval, Interval | None]], names: tuple[str, str]) -> str:
    """Estimates with their intervals, a row each: a filled mark and, under it, an optional hollow one."""
    if not rows:
        return ""
    known = [i for _, a, b in rows for i in (a, b) if i is not None]
    left, row_height, width = 160, 34, 720
    height = row_height * len(rows) + 34
    axis = _Axis(min(i.low for i in known), max(i.high for i in known), left, width - 16, pad=0.03)
    parts = []
    for tick in axis.ticks(8):
        x = axis(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="{height - 28}"/>')
        parts.append(f'<text x="{x:.1f}" y="{height - 12}" text-anchor="middle">{_number(tick)}</text>')
    for number, (label, first, second) in enumerate(rows):
        y = number * row_height + 20
        parts.append(f'<text class="label" x="{left - 12}" y="{y + 4}" text-anchor="end">{escape(label)}</text>')
        offset = 5 if second is not None else 0
        parts.append(_mark(axis, first, y - offset, f"{label}, {names[0]}", hollow=False))
        if second is not None:
            parts.append(_mark(axis, second, y + offset, f"{label}, {names[1]}", hollow=True))
    return f'<svg class="wide" viewBox="0 0 {width} {height}" role="img">' + "".join(parts) + "</svg>"


class _Axis:
    """Values to coordinates, with round ticks."""

    def __init__(self, low: float, high: float, start: float, end: float, pad: float = 0.0):
        if high - low < 1e-12 * max(1.0, abs(high)):
            room = abs(high) * 0.1
            low, high = (low - room, high + room) if room else (0.0, 1.0)  # nothing happened: below 0 nothing can
        margin = (high - low) * pad
        self.low, self.high, self.start, self.end = low - margin, high + margin, start, end

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, wanted: int = 5) -> list[float]:
        raw = (self.high - self.low) / wanted
        magnitude = 10.0 ** math.floor(math.log10(raw))
        step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= raw * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [i * step for i in range(first, last + 1)]


def _frame(x_axis: _Axis, y_axis: _Axis, x_label: str, whole: bool = True) -> str:
    """Grid and labels; `whole` labels whole numbers alone, as steps are."""
    bottom, parts = _HEIGHT - _BOTTOM, []
    for tick in y_axis.ticks(4):
        y = y_axis(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{_number(tick)}</text>')
    for tick in x_axis.ticks(6):
        if not whole or tick == int(tick):
            parts.append(f'<text x="{x_axis(tick):.1f}" y="{bottom + 14}" text-anchor="middle">{_number(tick)}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text>')
    return "".join(parts)


def _drawn(line: Line, points: Sequence[tuple[float, float]], x_axis: _Axis, y_axis: _Axis, titles: int) -> str:
    every = math.ceil(len(points) / titles) if titles else 0
    colour = f"var(--c{line.colour % COLOURS})"
    dash = ' stroke-dasharray="5 3"' if line.dashed else ""
    path, marks, pen_down = [], [], False
    for number, (x, y) in enumerate(points, start=1):
        if not math.isfinite(y):
            pen_down = False
            continue
        px, py = x_axis(x), y_axis(y)
        path.append(f"{'L' if pen_down else 'M'}{px:.1f} {py:.1f}")
        pen_down = True
        if every and (number % every == 0 or number == len(points)):
            title = f"<title>{escape(line.label)}, step {_number(x)}: {_number(y)}</title>"
            marks.append(f'<circle class="hit" cx="{px:.1f}" cy="{py:.1f}" r="6">{title}</circle>')
    if len(path) == 1:  # a single point has no line
        x, y = next((x, y) for x, y in points if math.isfinite(y))
        marks.append(f'<circle cx="{x_axis(x):.1f}" cy="{y_axis(y):.1f}" r="4" fill="{colour}"/>')
    return f'<path d="{"".join(path)}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>' + "".join(marks)


def _mark(axis: _Axis, interval: Interval, y: float, label: str, hollow: bool) -> str:
    low, mean, high = axis(interval.low), axis(interval.mean), axis(interval.high)
    text = f"{label}: {interval.mean:.3f} ({interval.low:.3f} to {interval.high:.3f})"
    colour, fill = "var(--c1)" if hollow else "var(--c0)", "var(--surface)" if hollow else "var(--c0)"
    return (
        f'<g stroke="{colour}" stroke-width="2"><title>{escape(text)}</title>'
        f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}"/>'
        f'<circle cx="{mean:.1f}" cy="{y}" r="4" fill="{fill}"/></g>'
    )


def _area(points: Sequence[tuple[float, float, float]], colour: int, x_axis: _Axis, y_axis: _Axis) -> str:
    there = [f"{x_axis(x):.1f} {y_axis(high):.1f}" for x, _, high in points]
    back = [f"{x_axis(x):.1f} {y_axis(low):.1f}" for x, low, _ in reversed(points)]
    path = f"M{'L'.join([*there, *back])}Z" if len(points) > 1 else ""
    return f'<path class="band" d="{path}" fill="var(--c{colour % COLOURS})"/>' if path else ""


def _thin_band(band: Band, most: int) -> list[tuple[float, float, float]]:
    """A band as thin as its lines; where either edge is not finite there is none."""
    low = _thin([(x, low) for x, low, _ in band.points], most)
    high = _thin([(x, high) for x, _, high in band.points], most)
    both = [(x, a, b) for (x, a), (_, b) in zip(low, high, strict=True)]
    return [point for point in both if all(math.isfinite(value) for value in point)]


def _thin(points: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """At most so many points: means over equal stretches, so that a long run stays light and readable."""
    size = math.ceil(len(points) / most)
    if size <= 1:
        return list(points)
    chunks = [points[i : i + size] for i in range(0, len(points), size)]
    return [(c[-1][0], _mean([y for _, y in c if math.isfinite(y)])) for c in chunks]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _number(value: float) -> str:
    if value == 0:
        return "0"
    if abs(value) >= 1e5 or abs(value) < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.4g}"
