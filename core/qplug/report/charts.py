"""Charts as inline SVG: no script, text that can be selected, and a title for those who hear them.

A function here computes where everything stands, a ``Figure``; ``templates/chart.html.jinja``
draws it. Colours are classes (``c0`` ... ``c7``) that the page's style gives a value, one for light
and one for dark. What differs by colour differs by shape, too.
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
_LINE = 12  # pixels from one line of text to the next, at least
_LETTER = 6.6  # the width of a letter of 12 pixels, about

Format = Callable[[float], str]


@dataclass(frozen=True)
class Bar:
    """A part of a row: from ``low`` to ``high``, and where in it a mark stands."""

    series: int
    low: float
    high: float
    title: str
    mark: float | None = None


@dataclass(frozen=True)
class Point:
    """A point of a scatter plot, and the name that the legend gives it."""

    x: float
    y: float
    name: str
    series: int


# --- shapes, in pixels from the upper left corner ------------------------------------------------


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
    """A line of text on the base line ``y``; ``full`` is its title where ``text`` is shortened."""

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
    """An SVG path that is stroked."""

    kind: ClassVar[str] = "curve"
    way: str
    colour: int


@dataclass(frozen=True)
class Marker:
    """An SVG path that is filled."""

    kind: ClassVar[str] = "marker"
    way: str
    colour: int
    title: str


Shape: TypeAlias = Line | Text | Box | Curve | Marker


@dataclass(frozen=True)
class Figure:
    """Shapes in the order in which they are drawn, and the keys of the legend above them."""

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
    """A line each, over 0, 1, 2 ...; None leaves a gap. Values are none below 0."""
    count = max(map(len, series.values()))
    every = [value for values in series.values() for value in values if value is not None]
    left, right, top, bottom = 64, WIDTH - 16, 12, 252
    room = 0.1 * (max(every) - min(every)) or 0.1 * max(every)
    ticks = nice_ticks(max(0.0, min(every) - room), max(every) + room)
    x = _scale(0, max(1, count - 1), left + 12, right - 12)
    y = _scale(ticks[0], ticks[-1], bottom, top)
    shapes: list[Shape] = _grid(ticks, y, left, right, format_)
    for place in _labelled(count):
        shapes.append(Text(x(place), bottom + 18, str(place), "middle"))
    shapes.append(Text((left + right) / 2, bottom + 38, x_label, "middle"))
    for number, (name, values) in enumerate(series.items()):
        points = [(x(n), y(v)) for n, v in enumerate(values) if v is not None]
        titles = [f"{name}, {n}: {format_(v)}" for n, v in enumerate(values) if v is not None]
        way = "".join(
            f"{'L' if n and values[n - 1] is not None else 'M'}{x(n):.1f},{y(v):.1f}"
            for n, v in enumerate(values)
            if v is not None
        )
        shapes.append(Curve(way, number % COLOURS))
        shapes += [_marker(number, *at, t) for at, t in zip(points, titles, strict=True)]
    return _drawn(f"{title}. {y_label}", shapes, bottom + 48, legend=[*series])


def rows(
    title: str,
    bars: Mapping[str, Sequence[Sequence[Bar]]],
    *,
    legend: Sequence[str],
    format_: Format,
) -> Markup:
    """Horizontal bars: of each row some lanes, one below the other, with bars side by side."""
    every = [bar for lanes in bars.values() for lane in lanes for bar in lane]
    low = min(0.0, *(bar.low for bar in every))
    high = max(0.0, *(bar.high for bar in every))
    ticks = nice_ticks(low, high)
    left = min(260.0, 20 + _LETTER * max(map(len, bars)))
    right, top, lane_height = WIDTH - 24, 10.0, 14.0
    x = _scale(ticks[0], ticks[-1], left + 8, right)
    shapes: list[Shape] = []
    at = top
    for name, lanes in bars.items():
        height = max(lane_height * len(lanes), _LINE)
        shapes.append(Text(left, at + height / 2 + 4, _shortened(name, left), "end", full=name))
        for number, lane in enumerate(lanes):
            for bar in lane:
                shapes += _bar(bar, x, at + lane_height * number, lane_height - 3)
        at += height + 9
    grid: list[Shape] = []
    for tick in ticks:
        grid.append(Line(x(tick), x(tick), top, at, "grid"))
        grid.append(Text(x(tick), at + 16, format_(tick), "middle"))
    return _drawn(title, [*grid, *shapes], at + 24, legend=legend)


def histogram(title: str, counts: Mapping[str, int], *, x_label: str, series: int = 0) -> Markup:
    """A column for each count, with what it is of below it."""
    ticks = nice_ticks(0, max(counts.values()))
    left, right, top, bottom = 72, WIDTH - 16, 12, 190
    y = _scale(0, ticks[-1], bottom, top)
    shapes: list[Shape] = _grid(ticks, y, left, right, lambda tick: f"{tick:,.0f}")
    width = (right - left) / len(counts)
    longest = max(map(len, counts)) * _LETTER + 8
    every = math.ceil(longest / width)
    for number, (name, count) in enumerate(counts.items()):
        at = left + number * width
        height = bottom - y(count)
        shapes.append(
            Box(at + 1.0, y(count), max(1.0, width - 2), height, series, f"{name}: {count:,}")
        )
        if number % every == 0:
            shapes.append(Text(at + width / 2, bottom + 17, name, "middle"))
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
    """Points with numbers beside them, and their names in the legend. The x axis begins at 0."""
    left, right, top, bottom = 72, WIDTH - 24, 16, 300
    x_ticks = nice_ticks(0, max(point.x for point in points))
    low, high = min(p.y for p in points), max(p.y for p in points)
    room = (high - low) * 0.1 or abs(high) * 0.05 or 1.0
    y_ticks = nice_ticks(low - room, high + room)
    x = _scale(x_ticks[0], x_ticks[-1], left + 8, right - 16)
    y = _scale(y_ticks[0], y_ticks[-1], bottom, top)
    shapes: list[Shape] = _grid(y_ticks, y, left, right, y_format)
    for tick in x_ticks:
        shapes.append(Text(x(tick), bottom + 18, x_format(tick), "middle"))
    shapes.append(Text((left + right) / 2, bottom + 38, x_label, "middle"))
    taken: list[tuple[float, float]] = []
    for point in points:
        said = f"{point.name}: {x_format(point.x)}, {y_format(point.y)}"
        shapes.append(_marker(point.series, x(point.x), y(point.y), said, size=5.0))
        beside = _free((x(point.x) + 9, y(point.y) + 4), taken)
        shapes.append(Text(*beside, str(point.series + 1), "start"))
    legend = [f"{point.series + 1}: {point.name}" for point in points]
    return _drawn(f"{title}. {y_label}", shapes, bottom + 48, legend=legend)


# --- parts ---------------------------------------------------------------------------------------


def nice_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from below ``low`` to above ``high``, in equal steps."""
    width = high - low
    if not (math.isfinite(width) and width > 0):
        high, width = low + 1.0, 1.0
    power = 10.0 ** math.floor(math.log10(width / most))
    step = next(m * power for m in (1, 2, 2.5, 5, 10, 20) if width / (m * power) <= most - 1)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """From values to pixels."""
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _grid(
    ticks: Sequence[float], y: Callable[[float], float], left: float, right: float, format_: Format
) -> list[Shape]:
    shapes: list[Shape] = []
    for tick in ticks:
        shapes.append(Line(left, right, y(tick), y(tick), "grid"))
        shapes.append(Text(left - 8, y(tick) + 4, format_(tick), "end"))
    return shapes


def _labelled(count: int) -> range:
    """The places on an axis of whole numbers that are labelled."""
    return range(0, count, max(1, math.ceil(count / 16)))


def _shortened(name: str, width: float) -> str:
    """The end of a name that is too long: what tells layers apart is there."""
    fitting = int((width - 20) / _LETTER)
    return name if len(name) <= fitting else "…" + name[1 - fitting :]


def _bar(bar: Bar, x: Callable[[float], float], top: float, height: float) -> list[Shape]:
    start, end = x(bar.low), x(bar.high)
    width = max(1.0, end - start)
    box = Box(start, top, width, height, bar.series % COLOURS, bar.title)
    if bar.mark is None:
        return [box]
    at = x(bar.mark)
    return [box, Line(at, at, top - 1, top + height + 1, "mark")]


def _marker(series: int, x: float, y: float, title: str, size: float = 3.5) -> Marker:
    """A circle, square, triangle or diamond."""
    ways = [
        f"M{x - size:.1f},{y:.1f}a{size},{size} 0 1 0 {2 * size},0"
        f"a{size},{size} 0 1 0 {-2 * size},0",
        f"M{x - size:.1f},{y - size:.1f}h{2 * size}v{2 * size}h{-2 * size}z",
        f"M{x:.1f},{y - size * 1.3:.1f}l{size * 1.3:.1f},{size * 2.3:.1f}h{-size * 2.6:.1f}z",
        f"M{x:.1f},{y - size * 1.4:.1f}l{size * 1.4:.1f},{size * 1.4:.1f}"
        f"l{-size * 1.4:.1f},{size * 1.4:.1f}l{-size * 1.4:.1f},{-size * 1.4:.1f}z",
    ]
    way = ways[(series + series // COLOURS) % len(ways)]  # all differ, of up to 32
    return Marker(way, series % COLOURS, title)


def _free(place: tuple[float, float], taken: list[tuple[float, float]]) -> tuple[float, float]:
    """``place``, or the first below it where no text is yet."""
    x, y = place
    while any(abs(x - old_x) < 2.5 * _LETTER and abs(y - old_y) < _LINE for old_x, old_y in taken):
        y += _LINE
    taken.append((x, y))
    return x, y


def _drawn(
    title: str, shapes: Sequence[Shape], height: float, *, legend: Sequence[str] = ()
) -> Markup:
    keys = [_marker(number, 8.0, 8.0, name, size=4.0) for number, name in enumerate(legend)]
    figure = Figure(title, shapes, math.ceil(height), keys)
    return render("chart.html.jinja", {"figure": figure})
