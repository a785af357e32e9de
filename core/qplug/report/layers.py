"""Draws the errors, ranges, scales and clips of layers, as charts and as tables for a page."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median
from typing import TYPE_CHECKING

from qplug.calibration.ranges import CLIP_BINS
from qplug.report import charts
from qplug.report.findings import BINS_PER_OCTAVE, Findings, Layer, Span
from qplug.report.words import number, span

if TYPE_CHECKING:
    from markupsafe import Markup

_BEFORE, _AFTER = 0, 1
#: The largest number of columns of a histogram of scales.
_COLUMNS = 48


@dataclass(frozen=True)
class Charted:
    """A chart, and the table of its numbers; the first cell of a row is the row's name."""

    chart: Markup
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Errors:
    """The errors of layers: whether any is ``known``, and a chart of those in blocks by depth."""

    known: bool
    by_depth: Charted | None


def output_errors(findings: Findings) -> Errors:
    """Returns the relative errors of the layers' outputs on the calibration data."""
    return _errors(findings, "Relative error of outputs", lambda layer: layer.loss)


def weight_errors(findings: Findings) -> Errors:
    """Returns the relative errors of the layers' weights."""
    return _errors(findings, "Relative error of weights", _error)


def _error(layer: Layer) -> float | None:
    return layer.recomputed if layer.error is None else layer.error


def _errors(findings: Findings, title: str, value: Callable[[Layer], float | None]) -> Errors:
    """Returns a line chart with a line for each kind over the blocks; experts are averaged."""
    known = any(value(layer) is not None for layer in findings.layers)
    depth = max((layer.block for layer in findings.layers if layer.block is not None), default=0)
    series: dict[str, list[float | None]] = {}
    for kind in dict.fromkeys(layer.kind for layer in findings.layers if layer.block is not None):
        means: list[float | None] = []
        for block in range(depth + 1):
            here = [
                layer for layer in findings.layers if (layer.block, layer.kind) == (block, kind)
            ]
            errors = [error for layer in here if (error := value(layer)) is not None]
            means.append(fmean(errors) if errors else None)
        if any(mean is not None for mean in means):
            series[kind] = means
    if not series:
        return Errors(known, None)
    rows = [(str(n), *(number(values[n]) for values in series.values())) for n in range(depth + 1)]
    chart = charts.lines(title, series, x_label="block", y_label=title, format_=number)
    return Errors(known, Charted(chart, ["block", *series], rows))


def weights(findings: Findings) -> Charted | None:
    """Returns the spans of weights by kind: in the float model, and dequantized."""
    if not findings.layers:
        return None
    bars, rows = {}, []
    for kind, layers in _kinds(findings):
        before = _widest(layer.weights[0] for layer in layers)
        after = _widest(layer.weights[1] for layer in layers)
        assert after is not None
        lanes = [[_bar(_BEFORE, before)]] if before else []
        bars[kind] = [*lanes, [_bar(_AFTER, after)]]
        rows.append((kind, _span(before), _span(after)))
    names = ["float model", "quantized"]
    chart = charts.rows("Weights before and after", bars, legend=names, format_=number)
    return Charted(chart, ["kind", *names], rows)


def inputs(findings: Findings) -> Charted | None:
    """Returns the spans of the layers' inputs by kind: before and after all transforms.

    None is returned if no layer has any, since the run had no calibration data.
    """
    bars, rows = {}, []
    for kind, layers in _kinds(findings):
        known = [layer.inputs for layer in layers if layer.inputs is not None]
        if known:
            lanes, cells = [], [kind]
            for moment in (_BEFORE, _AFTER):
                ranges = [both[moment] for both in known]
                whole = Span(min(r.low for r in ranges), max(r.high for r in ranges))
                typical = max(r.typical for r in ranges)
                lanes.append([_bar(moment, whole, typical)])
                cells += [_span(whole), number(typical)]
            bars[kind] = lanes
            rows.append(cells)
    if not bars:
        return None
    names = ["before", "after transforms"]
    chart = charts.rows("Inputs before and after", bars, legend=names, format_=number)
    return Charted(chart, ["kind", "before", "typical channel", "after", "typical channel"], rows)


def scales(findings: Findings) -> Charted | None:
    """Returns a histogram of the scales; None for a folder without scales."""
    if not findings.scales:
        return None
    rows = []
    for kind, layers in _kinds(findings):
        whole = _widest(layer.scales for layer in layers)
        count = sum(layer.scale_count for layer in layers)
        ends = (number(whole.low), number(whole.high)) if whole else ()
        rows.append((kind, f"{count:,}", *ends))
    counts = merged(findings.scales)
    chart = charts.histogram("Scales of weights", counts, x_label="scale, from", series=_BEFORE)
    return Charted(chart, ["kind", "scales", "smallest", "largest"], rows)


def merged(counts: Mapping[int, int]) -> dict[str, int]:
    """Returns ``Findings.scales`` in ``_COLUMNS`` columns or less, by the least scale of each."""
    first, last = min(counts), max(counts)
    step = 1
    while (last - first) // step >= _COLUMNS:
        step *= 2
    columns = dict.fromkeys(range(first // step, last // step + 1), 0)
    for bin_, count in counts.items():
        columns[bin_ // step] += count
    return {
        f"{2 ** (column * step / BINS_PER_OCTAVE):.2g}": count for column, count in columns.items()
    }


def clips(findings: Findings) -> Charted | None:
    """Returns a histogram of the ratios of scales to the scale that covers all weights.

    None is returned if no scale is smaller than that, or if clips are not known.
    """
    if not findings.calibrated:
        return None
    totals = [0] * len(CLIP_BINS)
    rows = []
    for kind, layers in _kinds(findings):
        counts = [0] * len(CLIP_BINS)
        for layer in layers:
            unclipped = (*[0] * (len(CLIP_BINS) - 1), layer.scale_count)
            for bin_, count in enumerate(layer.clips or unclipped):
                counts[bin_] += count
        totals = [total + count for total, count in zip(totals, counts, strict=True)]
        rows.append((kind, f"{sum(counts[:-1]):,}", f"{sum(counts):,}"))
    if not sum(totals[:-1]):
        return None
    names = [f"{low:g} to {high:g}" for low, high in pairwise(CLIP_BINS)]
    columns = dict(zip([*names, "not clipped"], totals, strict=True))
    chart = charts.histogram("Clips", columns, x_label="ratio to the covering scale", series=_AFTER)
    return Charted(chart, ["kind", "clipped scales", "all scales"], rows)


def every_layer(findings: Findings) -> Iterator[Sequence[str]]:
    """Yields a row of ten cells for each layer, with all its numbers."""
    for layer in findings.layers:
        yield (
            layer.name,
            f"{layer.shape[0]} x {layer.shape[1]}",
            layer.scheme,
            number(_error(layer)),
            number(layer.recomputed) if not layer.rewritten else "rewritten",
            number(layer.loss),
            *(_span(values) for values in layer.weights),
            *("-" if r is None else span(r.low, r.high) for r in layer.inputs or (None, None)),
        )


# --- spans ---------------------------------------------------------------------------------------


def _kinds(findings: Findings) -> list[tuple[str, list[Layer]]]:
    """Returns the kinds of layers, each with its layers."""
    kinds: dict[str, list[Layer]] = {}
    for layer in findings.layers:
        kinds.setdefault(layer.kind, []).append(layer)
    return [*kinds.items()]


def _widest(spans: Iterable[Span | None]) -> Span | None:
    """Returns the span that covers all of ``spans``; None if all are None."""
    known = [values for values in spans if values is not None]
    if not known:
        return None
    return Span(min(values.low for values in known), max(values.high for values in known))


def _bar(series: int, values: Span, mark: float | None = None) -> charts.Bar:
    return charts.Bar(series, values.low, values.high, span(values.low, values.high), mark)


def _span(values: Span | None) -> str:
    return "-" if values is None else span(values.low, values.high)


def experts(findings: Findings) -> Iterator[tuple[str, ...]]:
    """Yields a row for each layer with experts: tokens of the least, median and most used expert.

    The last column names the experts that got no token.
    """
    for layer, counts in findings.overview.experts.items():
        none = [str(number) for number, count in enumerate(counts) if not count]
        numbers = (min(counts), int(median(counts)), max(counts))
        yield layer, *map(str, numbers), ", ".join(none) or "-"
