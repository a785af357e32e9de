"""Draws charts as inline SVG that fits any width, with text that can be selected.

The functions here compute the place of every shape and return a ``Figure``, which
``templates/chart.html.jinja`` renders. Places from left to right are shares of the width, so that
shapes move and text keeps its size when the page becomes narrow; places from top to bottom are
pixels. Colours are classes (``c0`` ... ``c7``); the style sheet of the page gives every class one
value for light and one for dark pages. Markers of different colours also differ in shape.

Each shape that stands for a value has a title, which browsers show under the pointer. The script of
the page shows the same titles at once, and on the arrow keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, TypeAlias

from qplug.report.rendering import render

if TYPE_CHECKING:
    from markupsafe import Markup

COLOURS = 8
#: The width of a phone's page in pixels: charts are laid out for it, and stretch to wider pages.
NARROW = 320
_LINE = 12  # least distance of two lines of text, in pixels
_LETTER = 6.6  # average width of a letter at the font size of 12 pixels
_PANEL = (240, 120)  # width and height of a panel

Format: TypeAlias = Callable[[float], str]
#: From a value to its place.
_Scale: TypeAlias = Callable[[float], float]


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


# --- shapes --------------------------------------------------------------------------------------
# In a figure with the unit "%", x and width are in percent of the width of the figure; in a figure
# with the unit "" they are pixels. y and height are pixels. Places count from the upper left.


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
    """A filled rectangle. ``style`` is ``bar``, or ``hit`` for one that only takes the pointer."""

    kind: ClassVar[str] = "box"
    x: float
    y: float
    width: float
    height: float
    colour: int
    title: str
    style: str = "bar"


@dataclass(frozen=True)
class Curve:
    """A line along ``path``, which is SVG path data in pixels."""

    kind: ClassVar[str] = "curve"
    path: str
    colour: int


@dataclass(frozen=True)
class Marker:
    """A filled shape at ``x``, ``y``, with the outline ``path`` around 0, 0; "" has no title."""

    kind: ClassVar[str] = "marker"
    x: float
    y: float
    path: str
    colour: int
    title: str


Shape: TypeAlias = Line | Text | Box | Curve | Marker


@dataclass(frozen=True)
class Figure:
    """A chart: its shapes in drawing order, and the height in pixels.

    ``title`` is its text for screen readers, ``caption`` the text above it. The width is ``width``
    pixels, or of the page if ``width`` is None.
    """

    title: str
    shapes: Sequence[Shape]
    height: int
    width: int | None = None
    caption: str | None = None

    @property
    def unit(self) -> str:
        return "%" if self.width is None else ""


# --- charts --------------------------------------------------------------------------------------


def panels(
    title: str,
    series: Mapping[str, Mapping[str, Sequence[float | None]]],
    *,
    x_label: str,
    format_: Format,
) -> Markup:
    """Returns a line chart for each name in ``series``, all of the same scale, which begins at 0.

    A chart has a line for each of its own series, over x = 0, 1, 2 ... Values must not be negative;
    None leaves a gap. The largest value of a line has a marker.
    """
    values = [v for lines in series.values() for line in lines.values() for v in line]
    known = [value for value in values if value is not None]
    ticks = nice_ticks(0.0, max(known) or 1.0, most=4)
    count = max(len(line) for lines in series.values() for line in lines.values())
    figures = [
        _panel(title, name, lines, ticks, count, x_label=x_label, format_=format_)
        for name, lines in series.items()
    ]
    names = list(dict.fromkeys(name for lines in series.values() for name in lines))
    return _drawn(figures, legend=names if len(names) > 1 else ())


def _panel(
    title: str,
    name: str,
    lines: Mapping[str, Sequence[float | None]],
    ticks: Sequence[float],
    count: int,
    *,
    x_label: str,
    format_: Format,
) -> Figure:
    width, height = _PANEL
    left, right, top, bottom = 44, width - 6, 8, height - 20
    x = _scale(0, max(1, count - 1), left + 4, right - 4)
    y = _scale(ticks[0], ticks[-1], bottom, top)
    shapes: list[Shape] = _grid(ticks, y, left, right, left - 5, format_)
    for label in _labelled(count, 6):
        shapes.append(Text(x(label), bottom + 14, str(label), "middle"))
    for number, line in enumerate(lines.values()):
        shapes += _line(number, line, x, y)
    step = (right - left - 8) / max(1, count - 1)
    for place in range(count):
        told = _values_at(place, lines, format_)
        if told:
            start, end = max(left, x(place) - step / 2), min(right, x(place) + step / 2)
            text = f"{name}, {x_label} {place}: {told}"
            box = Box(start, top, max(1.0, end - start), bottom - top, 0, text, "hit")
            shapes.append(box)
    return Figure(
        f"{title}, {name}: {_in_words(lines, x_label, format_)}", shapes, height, width, name
    )


def _line(series: int, line: Sequence[float | None], x: _Scale, y: _Scale) -> list[Shape]:
    """Returns a line, with markers at its largest value and at values between two gaps."""
    places = {n: (x(n), y(v)) for n, v in enumerate(line) if v is not None}
    if not places:
        return []
    path = "".join(
        f"{'L' if n - 1 in places else 'M'}{at[0]:.1f},{at[1]:.1f}" for n, at in places.items()
    )
    alone = {n for n in places if n - 1 not in places and n + 1 not in places}
    largest = max(places, key=lambda n: line[n] or 0.0)
    marked = [_marker(series, *places[n], "", size=2.5) for n in sorted(alone | {largest})]
    return [Curve(path, series % COLOURS), *marked]


def _values_at(place: int, lines: Mapping[str, Sequence[float | None]], format_: Format) -> str:
    """Returns the values of ``lines`` at ``place``, with the names of the lines if several."""
    told = []
    for name, line in lines.items():
        value = line[place] if place < len(line) else None
        if value is not None:
            told.append(format_(value) if len(lines) == 1 else f"{name} {format_(value)}")
    return "; ".join(told)


def _in_words(lines: Mapping[str, Sequence[float | None]], x_label: str, format_: Format) -> str:
    """Returns the largest and the smallest value of each line, in words."""
    told = []
    for name, line in lines.items():
        known = {n: value for n, value in enumerate(line) if value is not None}
        if known:
            most, least = max(known, key=lambda n: known[n]), min(known, key=lambda n: known[n])
            words = (
                f"largest {format_(known[most])} in {x_label} {most}, "
                f"smallest {format_(known[least])} in {x_label} {least}"
            )
            told.append(words if len(lines) == 1 else f"{name}: {words}")
    return "; ".join(told)


def rows(
    title: str,
    bars: Mapping[str, Sequence[Sequence[Bar]]],
    *,
    legend: Sequence[str],
    format_: Format,
) -> Markup:
    """Returns a chart of horizontal bars, in rows by name, on an axis that has 0.

    A row has its name, and below it lanes, one below the other; a lane has bars from left to right.
    """
    all_bars = [bar for lanes in bars.values() for lane in lanes for bar in lane]
    low = min(0.0, *(bar.low for bar in all_bars))
    high = max(0.0, *(bar.high for bar in all_bars))
    ticks = nice_ticks(low, high, most=4)
    lane_height, y = 13.0, 4.0
    x = _scale(ticks[0], ticks[-1], 1.0, 99.0)
    shapes: list[Shape] = []
    for name, lanes in bars.items():
        shapes.append(Text(0, y + 11, _shortened(name), "start", full=name))
        y += 16
        for lane in lanes:
            for bar in lane:
                shapes += _bar(bar, x, y, lane_height - 2)
            y += lane_height
        y += 7
    grid: list[Shape] = []
    for number, tick in enumerate(ticks):
        grid.append(Line(x(tick), x(tick), 0, y, "grid"))
        grid.append(Text(x(tick), y + 15, format_(tick), _anchor(number, len(ticks))))
    words = [
        f"{name}: {', '.join(b.title for lane in lanes for b in lane)}"
        for name, lanes in bars.items()
    ]
    text = f"{title}. {'; '.join(words)}"
    return _drawn([Figure(text, [*grid, *shapes], math.ceil(y + 20))], legend=legend)


def histogram(title: str, counts: Mapping[str, int], *, x_label: str, series: int = 0) -> Markup:
    """Returns a chart with a column for each of ``counts``, and the count's name below it.

    The axis of counts begins at 0.
    """
    ticks = nice_ticks(0, max(counts.values()), most=4)
    left, right, top, bottom = 15.0, 100.0, 10, 170
    y = _scale(0, ticks[-1], bottom, top)
    shapes: list[Shape] = _grid(ticks, y, left, right, left - 2, _short_count)
    width = (right - left) / len(counts)
    longest = max(map(len, counts)) * _LETTER + 10
    label_step = math.ceil(longest / (width / 100 * NARROW))
    for number, (name, count) in enumerate(counts.items()):
        x = left + number * width
        box = Box(x, y(count), width, bottom - y(count), series, f"{name}: {count:,}")
        shapes.append(box)
        last = number == len(counts) - 1
        if number % label_step == 0 and (not last or label_step == 1):
            middle = x + width / 2
            near = middle + longest / 2 / NARROW * 100 > 100
            shapes.append(
                Text(100 if near else middle, bottom + 16, name, "end" if near else "middle")
            )
    shapes.append(Text((left + right) / 2, bottom + 34, x_label, "middle"))
    most = max(counts, key=lambda name: counts[name])
    total = sum(counts.values())
    text = f"{title}: {total:,} in {len(counts)} columns, most of them, {counts[most]:,}, at {most}"
    return _drawn([Figure(text, shapes, bottom + 42)])


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

    The x axis begins at 0. The y axis does not, and the caption says so.
    """
    left, right, top, bottom = 16.0, 99.0, 16, 260
    x_ticks = nice_ticks(0, max(point.x for point in points), most=4)
    low, high = min(p.y for p in points), max(p.y for p in points)
    margin = (high - low) * 0.1 or abs(high) * 0.05 or 1.0
    y_ticks = nice_ticks(max(0.0, low - margin) if low >= 0 else low - margin, high + margin)
    x = _scale(x_ticks[0], x_ticks[-1], left + 1, right - 6)
    y = _scale(y_ticks[0], y_ticks[-1], bottom, top)
    shapes: list[Shape] = _grid(y_ticks, y, left, right, left - 2, y_format)
    for number, tick in enumerate(x_ticks):
        anchor = _anchor(number, len(x_ticks))
        shapes.append(Text(x(tick), bottom + 17, x_format(tick), anchor))
    shapes.append(Text((left + right) / 2, bottom + 35, x_label, "middle"))
    taken: list[tuple[float, float]] = []
    for point in points:
        point_title = f"{point.name}: {x_format(point.x)}, {y_format(point.y)}"
        shapes.append(_marker(point.series, x(point.x), y(point.y), point_title, size=5.0))
        place = _free((x(point.x) + 2.5, y(point.y) + 4), taken)
        shapes.append(Text(*place, str(point.series + 1), "start"))
    legend = [f"{point.series + 1}: {point.name}" for point in points]
    cut = "" if y_ticks[0] == 0 else f"; its axis begins at {y_format(y_ticks[0])}, not at 0"
    words = "; ".join(f"{p.name}: {x_format(p.x)}, {y_format(p.y)}" for p in points)
    figure = Figure(f"{title}. {words}", shapes, bottom + 42, caption=f"{y_label}, upwards{cut}")
    return _drawn([figure], legend=legend)


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


def _scale(low: float, high: float, start: float, end: float) -> _Scale:
    """Returns a function from values to places: ``low`` is at ``start``, ``high`` at ``end``."""
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _grid(
    ticks: Sequence[float], y: _Scale, left: float, right: float, words: float, format_: Format
) -> list[Shape]:
    """Returns horizontal grid lines at ``ticks``, with their values, which end at ``words``."""
    shapes: list[Shape] = []
    for tick in ticks:
        shapes.append(Line(left, right, y(tick), y(tick), "grid"))
        shapes.append(Text(words, y(tick) + 4, format_(tick), "end"))
    return shapes


def _labelled(count: int, most: int) -> range:
    """Returns which of the numbers 0 ... ``count - 1`` on an axis have labels, about ``most``."""
    rough = max(1.0, count / most)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(int(m * power) for m in (1, 2, 5, 10) if m * power >= rough)
    return range(0, count, step)


def _anchor(number: int, count: int) -> str:
    """Returns where the text of a tick is tied to it: the ends of an axis have no room outside."""
    return "start" if number == 0 else "end" if number == count - 1 else "middle"


def _short_count(count: float) -> str:
    """Formats a count in few letters: ``2.5M``."""
    for letter, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.4g}{letter}"
    return f"{count:.4g}"


def _shortened(name: str) -> str:
    """Returns ``name``, or its end if it is too long, since names of layers differ at the end."""
    fitting = int(NARROW / _LETTER)
    return name if len(name) <= fitting else "…" + name[1 - fitting :]


def _bar(bar: Bar, x: _Scale, top: float, height: float) -> list[Shape]:
    """Returns the shapes of ``bar``: a box, and a line at its mark."""
    start, end = x(bar.low), x(bar.high)
    box = Box(start, top, max(0.2, end - start), height, bar.series % COLOURS, bar.title)
    if bar.mark is None:
        return [box]
    mark = x(bar.mark)
    return [box, Line(mark, mark, top - 1, top + height + 1, "mark")]


def _marker(series: int, x: float, y: float, title: str, size: float = 3.5) -> Marker:
    """Returns a circle, square, triangle or diamond around ``x``, ``y``."""
    outlines = [
        f"M{-size:.1f},0a{size},{size} 0 1 0 {2 * size},0a{size},{size} 0 1 0 {-2 * size},0",
        f"M{-size:.1f},{-size:.1f}h{2 * size}v{2 * size}h{-2 * size}z",
        f"M0,{-size * 1.3:.1f}l{size * 1.3:.1f},{size * 2.3:.1f}h{-size * 2.6:.1f}z",
        f"M0,{-size * 1.4:.1f}l{size * 1.4:.1f},{size * 1.4:.1f}"
        f"l{-size * 1.4:.1f},{size * 1.4:.1f}l{-size * 1.4:.1f},{-size * 1.4:.1f}z",
    ]
    # Up to 32 series differ in colour or shape.
    outline = outlines[(series + series // COLOURS) % len(outlines)]
    return Marker(x, y, outline, series % COLOURS, title)


def _free(place: tuple[float, float], taken: list[tuple[float, float]]) -> tuple[float, float]:
    """Returns ``place``, or the first place below it without text, and adds it to ``taken``."""
    x, y = place
    apart = 2.5 * _LETTER / NARROW * 100  # in percent, as far as on a narrow page
    while any(abs(x - old_x) < apart and abs(y - old_y) < _LINE for old_x, old_y in taken):
        y += _LINE
    taken.append((x, y))
    return x, y


def _drawn(figures: Sequence[Figure], *, legend: Sequence[str] = ()) -> Markup:
    """Renders figures, with a legend entry for each name in ``legend``."""
    keys = [(name, _marker(number, 8.0, 8.0, "", size=4.0)) for number, name in enumerate(legend)]
    return render("chart.html.jinja", {"figures": figures, "legend": keys})
