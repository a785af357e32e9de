"""Draws the errors, ranges, scales and clips of layers, as charts and as tables for a page."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median
from typing import TYPE_CHECKING

from qplug.calibration.ranges import CLIP_BINS
from qplug.report import charts
from qplug.report.findings import BINS_PER_OCTAVE, Findings, Layer, Span
from qplug.report.tables import Cell, Table
from qplug.report.words import number, span
from qplug.report.worst import ranked, weight_error

if TYPE_CHECKING:
    from markupsafe import Markup

_BEFORE, _AFTER = 0, 1
#: The largest number of columns of a histogram of scales.
_COLUMNS = 48


@dataclass(frozen=True)
class Charted:
    """A chart, and the table of its numbers."""

    chart: Markup
    table: Table


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
    return _errors(findings, "Relative error of weights", weight_error)


def _errors(findings: Findings, title: str, value: Callable[[Layer], float | None]) -> Errors:
    """Returns a line chart for each kind over the blocks; experts are averaged."""
    known = any(value(layer) is not None for layer in findings.layers)
    places = {
        layer.name: (layer.block, layer.kind, value(layer))
        for layer in findings.layers
        if layer.block is not None
    }
    series = by_depth(places.values())
    if not series:
        return Errors(known, None)
    lines = {kind: {"": means} for kind, means in series.items()}
    depth = max(map(len, series.values()))
    rows = [(str(n), *(number(values[n]) for values in series.values())) for n in range(depth)]
    chart = charts.panels(title, lines, x_label="block", format_=number)
    return Errors(known, Charted(chart, Table(f"{title}, by block", ["block", *series], rows)))


def by_depth(
    errors: Iterable[tuple[int | None, str, float | None]],
) -> dict[str, list[float | None]]:
    """Returns the mean error of each kind in each block: a list from block 0 on, by kind.

    ``errors``: the block, kind and error of layers. A kind without any error is left out.
    """
    found: dict[str, dict[int, list[float]]] = {}
    depth = 0
    for block, kind, error in errors:
        if block is not None:
            depth = max(depth, block + 1)
            blocks = found.setdefault(kind, {})
            if error is not None:
                blocks.setdefault(block, []).append(error)
    return {
        kind: [fmean(blocks[n]) if n in blocks else None for n in range(depth)]
        for kind, blocks in found.items()
        if blocks
    }


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
    return Charted(chart, Table("Weights, smallest and largest, by kind", ["kind", *names], rows))


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
    head = ["kind", "before", "typical channel", "after", "typical channel"]
    return Charted(chart, Table("Inputs, smallest and largest, by kind", head, rows))


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
    return Charted(chart, Table("Scales by kind", ["kind", "scales", "smallest", "largest"], rows))


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
    return Charted(chart, Table("Clips by kind", ["kind", "clipped scales", "all scales"], rows))


def every_layer(findings: Findings) -> Table:
    """Returns a table with a row for each layer, those with the largest errors first."""
    head = [
        *("layer", "shape", "scheme", "error", "error, recomputed", "error of outputs"),
        *("float weights", "quantized weights", "inputs before", "inputs after"),
    ]
    rows = [
        (
            layer.name,
            Cell(f"{layer.shape[0]} x {layer.shape[1]}", layer.shape[0] * layer.shape[1]),
            layer.scheme,
            _measured(weight_error(layer)),
            _measured(layer.recomputed) if not layer.rewritten else "rewritten",
            _measured(layer.loss),
            *(_width(values) for values in layer.weights),
            *(_width(Span(r.low, r.high) if r else None) for r in layer.inputs or (None, None)),
        )
        for layer in ranked(findings.layers)
    ]
    return Table("Quantized layers, the largest error first", head, rows, sortable=True)


def _measured(value: float | None) -> Cell:
    return Cell(number(value), value)


def _width(values: Span | None) -> Cell:
    """Returns the cell of a span, which is sorted by the largest magnitude."""
    return Cell(_span(values), max(-values.low, values.high) if values else None)


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


def experts(findings: Findings) -> Table | None:
    """Returns a row for each layer with experts: tokens of the least, median and most used expert.

    The last column names the experts that got no token. None is returned without experts.
    """
    rows = []
    for layer, counts in findings.overview.experts.items():
        none = [str(number) for number, count in enumerate(counts) if not count]
        numbers = (min(counts), int(median(counts)), max(counts))
        rows.append((layer, *map(str, numbers), ", ".join(none) or "-"))
    head = ["layer", "least", "median", "most", "without a token"]
    return Table("Calibration tokens of experts", head, rows) if rows else None
