"""Draws charts as inline SVG, without scripts, with selectable text and titles for screen readers.

The functions here compute the place of every shape and return a ``Figure``, which
``templates/chart.html.jinja`` renders. Colours are classes (``c0`` ... ``c7``); the style sheet of
the page gives every class one value for light and one for dark pages. Markers of different colours
also differ in shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, TypeAlias

from qplug.report.rendering import render

if TYPE_CHECKING:
    from markupsafe import Markup

WIDTH = 760
COLOURS = 8
_LINE = 12  # least distance of two lines of text, in pixels
_LETTER = 6.6  # average width of a letter at the font size of 12 pixels

Format = Callable[[float], str]


@dataclass(frozen=True)
class Bar:
    """A bar of a row, from the value ``low`` to ``high``, with a mark at the value ``mark``."""

    series: int
    low: float
    high: float
    title: str
    mark: float | None = None


@dataclass(frozen=True)
class Point:
    """A point of a scatter plot, and its name in the legend."""

    x: float
    y: float
    name: str
    series: int


# --- shapes; coordinates are pixels from the upper left corner -----------------------------------


@dataclass(frozen=True)
class Line:
    """A straight line; ``style`` is ``grid`` or ``mark``."""

    kind: ClassVar[str] = "line"
    x1: float
    x2: float
    y1: float
    y2: float
    style: str


@dataclass(frozen=True)
class Text:
    """A line of text on the base line ``y``; ``full`` is the text before it was shortened."""

    kind: ClassVar[str] = "text"
    x: float
    y: float
    text: str
    anchor: str
    full: str | None = None


@dataclass(frozen=True)
class Box:
    """A filled rectangle."""

    kind: ClassVar[str] = "box"
    x: float
    y: float
    width: float
    height: float
    colour: int
    title: str


@dataclass(frozen=True)
class Curve:
    """A line along ``path``, which is SVG path data."""

    kind: ClassVar[str] = "curve"
    path: str
    colour: int


@dataclass(frozen=True)
class Marker:
    """A filled shape with the outline ``path``, which is SVG path data."""

    kind: ClassVar[str] = "marker"
    path: str
    colour: int
    title: str


Shape: TypeAlias = Line | Text | Box | Curve | Marker


@dataclass(frozen=True)
class Figure:
    """A chart: its shapes in drawing order, and the markers of the legend above it."""

    title: str
    shapes: Sequence[Shape]
    height: int
    legend: Sequence[Marker] = ()
    width: int = WIDTH


# --- charts --------------------------------------------------------------------------------------


def lines(
    title: str,
    series: Mapping[str, Sequence[float | None]],
    *,
    x_label: str,
    y_label: str,
    format_: Format,
) -> Markup:
    """Returns a line chart with a line for each of ``series``, over x = 0, 1, 2 ...

    Values must not be negative; None leaves a gap.
    """
    count = max(map(len, series.values()))
    known = [value for values in series.values() for value in values if value is not None]
    left, right, top, bottom = 64, WIDTH - 16, 12, 252
    margin = 0.1 * (max(known) - min(known)) or 0.1 * max(known)
    ticks = nice_ticks(max(0.0, min(known) - margin), max(known) + margin)
    x = _scale(0, max(1, count - 1), left + 12, right - 12)
    y = _scale(ticks[0], ticks[-1], bottom, top)
    shapes: list[Shape] = _grid(ticks, y, left, right, format_)
    for label in _labelled(count):
        shapes.append(Text(x(label), bottom + 18, str(label), "middle"))
    shapes.append(Text((left + right) / 2, bottom + 38, x_label, "middle"))
    for number, (name, values) in enumerate(series.items()):
        points = [(x(n), y(v)) for n, v in enumerate(values) if v is not None]
        titles = [f"{name}, {n}: {format_(v)}" for n, v in enumerate(values) if v is not None]
        path = "".join(
            f"{'L' if n and values[n - 1] is not None else 'M'}{x(n):.1f},{y(v):.1f}"
            for n, v in enumerate(values)
            if v is not None
        )
        shapes.append(Curve(path, number % COLOURS))
        shapes += [_marker(number, *point, t) for point, t in zip(points, titles, strict=True)]
    return _drawn(f"{title}. {y_label}", shapes, bottom + 48, legend=[*series])


def rows(
    title: str,
    bars: Mapping[str, Sequence[Sequence[Bar]]],
    *,
    legend: Sequence[str],
    format_: Format,
) -> Markup:
    """Returns a chart of horizontal bars, in rows by name.

    A row has lanes, one below the other; a lane has bars from left to right.
    """
    all_bars = [bar for lanes in bars.values() for lane in lanes for bar in lane]
    low = min(0.0, *(bar.low for bar in all_bars))
    high = max(0.0, *(bar.high for bar in all_bars))
    ticks = nice_ticks(low, high)
    left = min(260.0, 20 + _LETTER * max(map(len, bars)))
    right, top, lane_height = WIDTH - 24, 10.0, 14.0
    x = _scale(ticks[0], ticks[-1], left + 8, right)
    shapes: list[Shape] = []
    y = top
    for name, lanes in bars.items():
        height = max(lane_height * len(lanes), _LINE)
        shapes.append(Text(left, y + height / 2 + 4, _shortened(name, left), "end", full=name))
        for number, lane in enumerate(lanes):
            for bar in lane:
                shapes += _bar(bar, x, y + lane_height * number, lane_height - 3)
        y += height + 9
    grid: list[Shape] = []
    for tick in ticks:
        grid.append(Line(x(tick), x(tick), top, y, "grid"))
        grid.append(Text(x(tick), y + 16, format_(tick), "middle"))
    return _drawn(title, [*grid, *shapes], y + 24, legend=legend)


def histogram(title: str, counts: Mapping[str, int], *, x_label: str, series: int = 0) -> Markup:
    """Returns a chart with a column for each of ``counts``, and the count's name below it."""
    ticks = nice_ticks(0, max(counts.values()))
    left, right, top, bottom = 72, WIDTH - 16, 12, 190
    y = _scale(0, ticks[-1], bottom, top)
    shapes: list[Shape] = _grid(ticks, y, left, right, lambda tick: f"{tick:,.0f}")
    width = (right - left) / len(counts)
    longest = max(map(len, counts)) * _LETTER + 8
    label_step = math.ceil(longest / width)
    for number, (name, count) in enumerate(counts.items()):
        x = left + number * width
        height = bottom - y(count)
        shapes.append(
            Box(x + 1.0, y(count), max(1.0, width - 2), height, series, f"{name}: {count:,}")
        )
        if number % label_step == 0:
            shapes.append(Text(x + width / 2, bottom + 17, name, "middle"))
    shapes.append(Text((left + right) / 2, bottom + 37, x_label, "middle"))
    return _drawn(title, shapes, bottom + 46)


def scatter(
    title: str,
    points: Sequence[Point],
    *,
    x_label: str,
    y_label: str,
    x_format: Format,
    y_format: Format,
) -> Markup:
    """Returns a scatter plot with a number at every point; the legend has the points' names.

    The x axis begins at 0.
    """
    left, right, top, bottom = 72, WIDTH - 24, 16, 300
    x_ticks = nice_ticks(0, max(point.x for point in points))
    low, high = min(p.y for p in points), max(p.y for p in points)
    margin = (high - low) * 0.1 or abs(high) * 0.05 or 1.0
    y_ticks = nice_ticks(low - margin, high + margin)
    x = _scale(x_ticks[0], x_ticks[-1], left + 8, right - 16)
    y = _scale(y_ticks[0], y_ticks[-1], bottom, top)
    shapes: list[Shape] = _grid(y_ticks, y, left, right, y_format)
    for tick in x_ticks:
        shapes.append(Text(x(tick), bottom + 18, x_format(tick), "middle"))
    shapes.append(Text((left + right) / 2, bottom + 38, x_label, "middle"))
    taken: list[tuple[float, float]] = []
    for point in points:
        point_title = f"{point.name}: {x_format(point.x)}, {y_format(point.y)}"
        shapes.append(_marker(point.series, x(point.x), y(point.y), point_title, size=5.0))
        place = _free((x(point.x) + 9, y(point.y) + 4), taken)
        shapes.append(Text(*place, str(point.series + 1), "start"))
    legend = [f"{point.series + 1}: {point.name}" for point in points]
    return _drawn(f"{title}. {y_label}", shapes, bottom + 48, legend=legend)


# --- axes, bars and markers ----------------------------------------------------------------------


def nice_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Returns round numbers in equal steps that cover ``low`` to ``high``, about ``most``."""
    width = high - low
    if not (math.isfinite(width) and width > 0):
        high, width = low + 1.0, 1.0
    power = 10.0 ** math.floor(math.log10(width / most))
    step = next(m * power for m in (1, 2, 2.5, 5, 10, 20) if width / (m * power) <= most - 1)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """Returns a function from values to pixels: ``low`` is at ``start``, ``high`` at ``end``."""
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _grid(
    ticks: Sequence[float], y: Callable[[float], float], left: float, right: float, format_: Format
) -> list[Shape]:
    """Returns horizontal grid lines at ``ticks``, with their values to the left."""
    shapes: list[Shape] = []
    for tick in ticks:
        shapes.append(Line(left, right, y(tick), y(tick), "grid"))
        shapes.append(Text(left - 8, y(tick) + 4, format_(tick), "end"))
    return shapes


def _labelled(count: int) -> range:
    """Returns which of the numbers 0 ... ``count - 1`` on an axis have labels, 16 at most."""
    return range(0, count, max(1, math.ceil(count / 16)))


def _shortened(name: str, width: float) -> str:
    """Returns ``name``, or its end if it is too long, since names of layers differ at the end."""
    fitting = int((width - 20) / _LETTER)
    return name if len(name) <= fitting else "…" + name[1 - fitting :]


def _bar(bar: Bar, x: Callable[[float], float], top: float, height: float) -> list[Shape]:
    """Returns the shapes of ``bar``: a box, and a line at its mark."""
    start, end = x(bar.low), x(bar.high)
    width = max(1.0, end - start)
    box = Box(start, top, width, height, bar.series % COLOURS, bar.title)
    if bar.mark is None:
        return [box]
    mark = x(bar.mark)
    return [box, Line(mark, mark, top - 1, top + height + 1, "mark")]


def _marker(series: int, x: float, y: float, title: str, size: float = 3.5) -> Marker:
    """Returns a circle, square, triangle or diamond around ``x``, ``y``."""
    outlines = [
        f"M{x - size:.1f},{y:.1f}a{size},{size} 0 1 0 {2 * size},0"
        f"a{size},{size} 0 1 0 {-2 * size},0",
        f"M{x - size:.1f},{y - size:.1f}h{2 * size}v{2 * size}h{-2 * size}z",
        f"M{x:.1f},{y - size * 1.3:.1f}l{size * 1.3:.1f},{size * 2.3:.1f}h{-size * 2.6:.1f}z",
        f"M{x:.1f},{y - size * 1.4:.1f}l{size * 1.4:.1f},{size * 1.4:.1f}"
        f"l{-size * 1.4:.1f},{size * 1.4:.1f}l{-size * 1.4:.1f},{-size * 1.4:.1f}z",
    ]
    # Up to 32 series differ in colour or shape.
    outline = outlines[(series + series // COLOURS) % len(outlines)]
    return Marker(outline, series % COLOURS, title)


def _free(place: tuple[float, float], taken: list[tuple[float, float]]) -> tuple[float, float]:
    """Returns ``place``, or the first place below it without text, and adds it to ``taken``."""
    x, y = place
    while any(abs(x - old_x) < 2.5 * _LETTER and abs(y - old_y) < _LINE for old_x, old_y in taken):
        y += _LINE
    taken.append((x, y))
    return x, y


def _drawn(
    title: str, shapes: Sequence[Shape], height: float, *, legend: Sequence[str] = ()
) -> Markup:
    """Renders a figure, with a legend entry for each name in ``legend``."""
    keys = [_marker(number, 8.0, 8.0, name, size=4.0) for number, name in enumerate(legend)]
    figure = Figure(title, shapes, math.ceil(height), keys)
    return render("chart.html.jinja", {"figure": figure})
