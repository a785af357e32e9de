"""What a report shows of single layers: errors, ranges, scales, clips, as charts and tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import TYPE_CHECKING

from qplug.calibration.ranges import CLIP_BINS
from qplug.report import charts
from qplug.report.findings import BINS_PER_OCTAVE, Findings, Layer, Span
from qplug.report.words import number, span

if TYPE_CHECKING:
    from markupsafe import Markup

_BEFORE, _AFTER = 0, 1
#: Columns that a histogram of scales has at most.
_COLUMNS = 48


@dataclass(frozen=True)
class Charted:
    """A chart, and the table of its numbers: the first cell of a row names it."""

    chart: Markup
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Errors:
    """Whether the error of any layer is ``known``, and the errors of those in blocks, if any is."""

    known: bool
    by_depth: Charted | None


def output_errors(findings: Findings) -> Errors:
    """The relative error of what each layer computes on the calibration data."""
    return _errors(findings, "Relative error of outputs", lambda layer: layer.loss)


def weight_errors(findings: Findings) -> Errors:
    """The relative error of each layer's weight."""
    return _errors(findings, "Relative error of weights", _error)


def _error(layer: Layer) -> float | None:
    return layer.recomputed if layer.error is None else layer.error


def _errors(findings: Findings, title: str, value: Callable[[Layer], float | None]) -> Errors:
    """A line for each kind over the blocks, and the numbers. Experts of a block are averaged."""
    known = any(value(layer) is not None for layer in findings.layers)
    depth = max((layer.block for layer in findings.layers if layer.block is not None), default=0)
    series: dict[str, list[float | None]] = {}
    for kind in dict.fromkeys(layer.kind for layer in findings.layers if layer.block is not None):
        means: list[float | None] = []
        for block in range(depth + 1):
            own = [layer for layer in findings.layers if (layer.block, layer.kind) == (block, kind)]
            errors = [error for layer in own if (error := value(layer)) is not None]
            means.append(fmean(errors) if errors else None)
        if any(mean is not None for mean in means):
            series[kind] = means
    if not series:
        return Errors(known, None)
    rows = [(str(n), *(number(values[n]) for values in series.values())) for n in range(depth + 1)]
    chart = charts.lines(title, series, x_label="block", y_label=title, format_=number)
    return Errors(known, Charted(chart, ["block", *series], rows))


def weights(findings: Findings) -> Charted | None:
    """The span of weights by kind: in the float model, and as the codes mean them."""
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
    """The span of what layers read by kind: as the model came, and after all transforms."""
    bars, rows = {}, []
    for kind, layers in _kinds(findings):
        known = [layer.inputs for layer in layers if layer.inputs is not None]
        if known:
            moments = []
            for moment in (_BEFORE, _AFTER):
                ranges = [both[moment] for both in known]
                wide = Span(min(r.low for r in ranges), max(r.high for r in ranges))
                moments.append((wide, max(r.typical for r in ranges)))
            bars[kind] = [[_bar(n, wide, mark)] for n, (wide, mark) in enumerate(moments)]
            rows.append((kind, *(part for w, mark in moments for part in (_span(w), number(mark)))))
    if not bars:
        return None
    names = ["before", "after transforms"]
    chart = charts.rows("Inputs before and after", bars, legend=names, format_=number)
    return Charted(chart, ["kind", "before", "typical channel", "after", "typical channel"], rows)


def scales(findings: Findings) -> Charted | None:
    """The number of scales of each size; None for a folder without scales."""
    if not findings.scales:
        return None
    rows = []
    for kind, layers in _kinds(findings):
        wide = _widest(layer.scales for layer in layers)
        count = sum(layer.scale_count for layer in layers)
        rows.append((kind, f"{count:,}", *((number(wide.low), number(wide.high)) if wide else ())))
    counts = merged(findings.scales)
    chart = charts.histogram("Scales of weights", counts, x_label="scale, from", series=_BEFORE)
    return Charted(chart, ["kind", "scales", "least", "greatest"], rows)


def merged(counts: Mapping[int, int]) -> dict[str, int]:
    """``Findings.scales`` with as many columns as can be seen, by the least scale of each."""
    first, last = min(counts), max(counts)
    step = 1
    while (last - first) // step >= _COLUMNS:
        step *= 2
    columns = dict.fromkeys(range(first // step, last // step + 1), 0)
    for place, count in counts.items():
        columns[place // step] += count
    return {f"{2 ** (at * step / BINS_PER_OCTAVE):.2g}": n for at, n in columns.items()}


def clips(findings: Findings) -> Charted | None:
    """The number of scales by their part of the one that covers the weights; None without clips."""
    if not findings.calibrated:
        return None
    totals = [0] * len(CLIP_BINS)
    rows = []
    for kind, layers in _kinds(findings):
        own = [0] * len(CLIP_BINS)
        for layer in layers:
            for place, count in enumerate(
                layer.clips or (*[0] * len(totals[1:]), layer.scale_count)
            ):
                own[place] += count
        totals = [a + b for a, b in zip(totals, own, strict=True)]
        rows.append((kind, f"{sum(own[:-1]):,}", f"{sum(own):,}"))
    if not sum(totals[:-1]):
        return None
    names = [f"{low:g} to {high:g}" for low, high in pairwise(CLIP_BINS)]
    columns = dict(zip([*names, "not clipped"], totals, strict=True))
    chart = charts.histogram("Clips", columns, x_label="part of the covering scale", series=_AFTER)
    return Charted(chart, ["kind", "clipped", "of scales"], rows)


def every_layer(findings: Findings) -> Iterator[Sequence[str]]:
    """All numbers of each layer, a row of ten cells each."""
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


# --- parts ---------------------------------------------------------------------------------------


def _kinds(findings: Findings) -> list[tuple[str, list[Layer]]]:
    kinds: dict[str, list[Layer]] = {}
    for layer in findings.layers:
        kinds.setdefault(layer.kind, []).append(layer)
    return [*kinds.items()]


def _widest(spans: Iterable[Span | None]) -> Span | None:
    known = [found for found in spans if found is not None]
    if not known:
        return None
    return Span(min(found.low for found in known), max(found.high for found in known))


def _bar(series: int, found: Span, mark: float | None = None) -> charts.Bar:
    return charts.Bar(series, found.low, found.high, span(found.low, found.high), mark)


def _span(found: Span | None) -> str:
    return "-" if found is None else span(found.low, found.high)
