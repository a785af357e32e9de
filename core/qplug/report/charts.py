"""Charts as inline SVG: no script, text that can be selected, and a title for those who hear them.

Colours are classes (``c0`` ... ``c7``) that the page's style gives a value, one for light and one
for dark. What differs by colour differs by shape, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from qplug.report.markup import Child, Markup, tag

WIDTH = 760
COLOURS = 8
_TEXT = 12  # pixels from one line of text to the next, at least
_LETTER = 6.6  # the width of a letter of 12 pixels, about

Format = Callable[[float], str]


@dataclass(frozen=True)
class Bar:
    """A part of a row: from ``low`` to ``high``, and where in it a mark stands."""

    series: int
    low: float
    high: float
    told: str
    mark: float | None = None


@dataclass(frozen=True)
class Point:
    """A point of a scatter plot, and what stands beside it."""

    x: float
    y: float
    name: str
    series: int


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
    drawn = [_grid(ticks, y, left, right, format_)]
    for place in _labelled(count):
        drawn.append(_text(x(place), bottom + 18, str(place), "middle"))
    drawn.append(_text((left + right) / 2, bottom + 38, x_label, "middle"))
    for number, (name, values) in enumerate(series.items()):
        points = [(x(n), y(v)) for n, v in enumerate(values) if v is not None]
        told = [f"{name}, {n}: {format_(v)}" for n, v in enumerate(values) if v is not None]
        way = "".join(
            f"{'L' if n and values[n - 1] is not None else 'M'}{x(n):.1f},{y(v):.1f}"
            for n, v in enumerate(values)
            if v is not None
        )
        drawn.append(tag("path", d=way, class_=f"line c{number % COLOURS}"))
        drawn += [_marker(number, *at, t) for at, t in zip(points, told, strict=True)]
    return _figure(f"{title}. {y_label}", drawn, bottom + 48, legend=[*series])


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
    drawn, at = [], top
    for name, lanes in bars.items():
        height = max(lane_height * len(lanes), _TEXT)
        drawn.append(_text(left, at + height / 2 + 4, _shortened(name, left), "end", full=name))
        for number, lane in enumerate(lanes):
            for bar in lane:
                drawn += _bar(bar, x, at + lane_height * number, lane_height - 3)
        at += height + 9
    grid = []
    for tick in ticks:
        grid.append(tag("line", x1=x(tick), x2=x(tick), y1=top, y2=at, class_="grid"))
        grid.append(_text(x(tick), at + 16, format_(tick), "middle"))
    return _figure(title, [*grid, *drawn], at + 24, legend=legend)


def histogram(title: str, counts: Mapping[str, int], *, x_label: str, series: int = 0) -> Markup:
    """A column for each count, with what it is of below it."""
    ticks = nice_ticks(0, max(counts.values()))
    left, right, top, bottom = 72, WIDTH - 16, 12, 190
    y = _scale(0, ticks[-1], bottom, top)
    drawn = [_grid(ticks, y, left, right, lambda tick: f"{tick:,.0f}")]
    width = (right - left) / len(counts)
    longest = max(map(len, counts)) * _LETTER + 8
    every = math.ceil(longest / width)
    for number, (name, count) in enumerate(counts.items()):
        at = left + number * width
        drawn.append(
            tag(
                "rect",
                tag("title", f"{name}: {count:,}"),
                x=at + 1.0,
                y=y(count),
                width=max(1.0, width - 2),
                height=bottom - y(count),
                class_=f"bar c{series}",
            )
        )
        if number % every == 0:
            drawn.append(_text(at + width / 2, bottom + 17, name, "middle"))
    drawn.append(_text((left + right) / 2, bottom + 37, x_label, "middle"))
    return _figure(title, drawn, bottom + 46)


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
    drawn = [_grid(y_ticks, y, left, right, y_format)]
    for tick in x_ticks:
        drawn.append(_text(x(tick), bottom + 18, x_format(tick), "middle"))
    drawn.append(_text((left + right) / 2, bottom + 38, x_label, "middle"))
    taken: list[tuple[float, float]] = []
    for point in points:
        told = f"{point.name}: {x_format(point.x)}, {y_format(point.y)}"
        drawn.append(_marker(point.series, x(point.x), y(point.y), told, size=5.0))
        beside = _free((x(point.x) + 9, y(point.y) + 4), taken)
        drawn.append(_text(*beside, str(point.series + 1), "start"))
    legend = [f"{point.series + 1}: {point.name}" for point in points]
    return _figure(f"{title}. {y_label}", drawn, bottom + 48, legend=legend)


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
) -> Markup:
    drawn = []
    for tick in ticks:
        drawn.append(tag("line", x1=left, x2=right, y1=y(tick), y2=y(tick), class_="grid"))
        drawn.append(_text(left - 8, y(tick) + 4, format_(tick), "end"))
    return tag("g", drawn)


def _labelled(count: int) -> range:
    """The places on an axis of whole numbers that are labelled."""
    return range(0, count, max(1, math.ceil(count / 16)))


def _text(x: float, y: float, told: str, anchor: str, *, full: str | None = None) -> Markup:
    title: Child = tag("title", full) if full and full != told else ""
    return tag("text", title, told, x=float(x), y=float(y), text_anchor=anchor)


def _shortened(name: str, width: float) -> str:
    """The end of a name that is too long: what tells layers apart is there."""
    fitting = int((width - 20) / _LETTER)
    return name if len(name) <= fitting else "…" + name[1 - fitting :]


def _bar(bar: Bar, x: Callable[[float], float], top: float, height: float) -> list[Markup]:
    start, end = x(bar.low), x(bar.high)
    drawn = [
        tag(
            "rect",
            tag("title", bar.told),
            x=start,
            y=top,
            width=max(1.0, end - start),
            height=height,
            class_=f"bar c{bar.series % COLOURS}",
        )
    ]
    if bar.mark is not None:
        at = x(bar.mark)
        drawn.append(tag("line", x1=at, x2=at, y1=top - 1, y2=top + height + 1, class_="mark"))
    return drawn


def _marker(series: int, x: float, y: float, told: str, size: float = 3.5) -> Markup:
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
    return tag("path", tag("title", told), d=way, class_=f"bar c{series % COLOURS}")


def _free(place: tuple[float, float], taken: list[tuple[float, float]]) -> tuple[float, float]:
    """``place``, or the first below it where no text is yet."""
    x, y = place
    while any(abs(x - old_x) < 2.5 * _LETTER and abs(y - old_y) < _TEXT for old_x, old_y in taken):
        y += _TEXT
    taken.append((x, y))
    return x, y


def _figure(
    title: str, drawn: Sequence[Child], height: float, *, legend: Sequence[str] = ()
) -> Markup:
    keys = [
        tag(
            "li",
            tag(
                "svg",
                _marker(number, 8.0, 8.0, name, size=4.0),
                viewBox="0 0 16 16",
                width=16,
                height=16,
                aria_hidden="true",
            ),
            name,
        )
        for number, name in enumerate(legend)
    ]
    picture = tag(
        "svg",
        tag("title", title),
        list(drawn),
        viewBox=f"0 0 {WIDTH} {math.ceil(height)}",
        width=WIDTH,
        height=math.ceil(height),
        role="img",
        aria_label=title,
        class_="chart",
    )
    return tag(
        "div",
        tag("ul", keys, class_="legend") if keys else "",
        tag("div", picture, class_="scroll", tabindex="0"),
    )
