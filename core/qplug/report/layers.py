"""The sections of a report that look at single layers: errors, ranges, scales, clips."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from statistics import fmean

from qplug.calibration.ranges import CLIP_BINS
from qplug.report import charts
from qplug.report.findings import BINS_PER_OCTAVE, Findings, Layer, Span
from qplug.report.markup import Child, Markup, table, tag
from qplug.report.words import number, span

_BEFORE, _AFTER = 0, 1
#: Columns that a histogram of scales has at most.
_COLUMNS = 48


def section(title: str, *children: Child) -> Markup:
    """A part of the page with its heading."""
    return tag("section", tag("h2", title), *children)


def faint(told: str) -> Markup:
    """A paragraph that explains, or says what is not known."""
    return tag("p", told, class_="faint")


def errors(findings: Findings) -> Markup:
    """The error of each layer, by kind and depth: of outputs if there were data, and of weights."""
    title = "Error by kind and depth"
    if not findings.layers:
        return section(title, faint("Nothing is quantized."))
    parts: list[Child] = []
    if any(layer.loss is not None for layer in findings.layers):
        parts.append(tag("h3", "Of what layers compute on the calibration data"))
        parts += _by_depth(findings, "Relative error of outputs", lambda layer: layer.loss)
    parts.append(tag("h3", "Of weights"))
    if all(_error(layer) is None for layer in findings.layers):
        parts.append(faint("Not known: name the float model with --against."))
    else:
        parts += _by_depth(findings, "Relative error of weights", _error)
    return section(title, *parts)


def _error(layer: Layer) -> float | None:
    return layer.recomputed if layer.error is None else layer.error


def _by_depth(
    findings: Findings, title: str, value: Callable[[Layer], float | None]
) -> list[Markup]:
    """A line for each kind over the blocks, and the numbers. Experts of a block are averaged."""
    depth = max((layer.block for layer in findings.layers if layer.block is not None), default=0)
    series: dict[str, list[float | None]] = {}
    for kind in dict.fromkeys(layer.kind for layer in findings.layers if layer.block is not None):
        found: list[float | None] = []
        for block in range(depth + 1):
            own = [layer for layer in findings.layers if (layer.block, layer.kind) == (block, kind)]
            known = [told for layer in own if (told := value(layer)) is not None]
            found.append(fmean(known) if known else None)
        if any(told is not None for told in found):
            series[kind] = found
    if not series:
        return [faint("Not known.")]
    rows = [(str(n), *(number(values[n]) for values in series.values())) for n in range(depth + 1)]
    return [
        charts.lines(title, series, x_label="block", y_label=title, format_=number),
        tag("details", tag("summary", "As a table"), table(["block", *series], rows)),
    ]


def weights(findings: Findings) -> Markup:
    """The span of weights by kind: in the float model, and as the codes mean them."""
    title = "Weights before and after"
    if not findings.layers:
        return section(title, faint("Nothing is quantized."))
    bars, rows = {}, []
    for kind, layers in _kinds(findings):
        before = _widest(layer.weights[0] for layer in layers)
        after = _widest(layer.weights[1] for layer in layers)
        assert after is not None
        lanes = [[_bar(_BEFORE, before)]] if before else []
        bars[kind] = [*lanes, [_bar(_AFTER, after)]]
        rows.append((kind, _span(before), _span(after)))
    told = "From the least to the greatest weight of all layers of a kind."
    if findings.against is None:
        told += " The float model is not at hand; name it with --against."
    if any(layer.rewritten for layer in findings.layers):
        told += " Algorithms moved scale between layers: what was rounded differs from the float."
    return section(
        title,
        faint(told),
        charts.rows(title, bars, legend=["float model", "quantized"], format_=number),
        table(["kind", "float model", "quantized"], rows),
    )


def inputs(findings: Findings) -> Markup:
    """The span of what layers read: as the model came, and after all transforms."""
    title = "Inputs before and after"
    bars, rows = {}, []
    for kind, layers in _kinds(findings):
        known = [layer.inputs for layer in layers if layer.inputs is not None]
        if known:
            told = []
            for moment in (0, 1):
                ranges = [both[moment] for both in known]
                wide = Span(min(r.low for r in ranges), max(r.high for r in ranges))
                told.append((wide, max(r.typical for r in ranges)))
            bars[kind] = [[_bar(moment, wide, mark)] for moment, (wide, mark) in enumerate(told)]
            rows.append((kind, *(part for w, mark in told for part in (_span(w), number(mark)))))
    if not bars:
        return section(title, faint("Not known: nothing was calibrated."))
    head = ["kind", "before", "typical channel", "after", "typical channel"]
    return section(
        title,
        faint(
            "From the least to the greatest input over the calibration data. A mark stands at the "
            "largest magnitude of a typical channel: if it is far inside, a few are outliers."
        ),
        charts.rows(title, bars, legend=["before", "after transforms"], format_=number),
        table(head, rows),
    )


def scales(findings: Findings) -> Markup:
    """How many scales there are of each size."""
    title = "Scales"
    if not findings.scales:
        return section(title, faint("This folder holds no scales."))
    rows = []
    for kind, layers in _kinds(findings):
        wide = _widest(layer.scales for layer in layers)
        count = sum(layer.scale_count for layer in layers)
        rows.append((kind, f"{count:,}", *((number(wide.low), number(wide.high)) if wide else ())))
    return section(
        title,
        charts.histogram(
            "Scales of weights", merged(findings.scales), x_label="scale, from", series=0
        ),
        table(["kind", "scales", "least", "greatest"], rows),
    )


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


def clips(findings: Findings) -> Markup:
    """How far below the range of the weights that they round scales were chosen."""
    title = "Clips"
    if not findings.calibrated:
        return section(title, faint("Nothing is clipped: scales cover all weights."))
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
        return section(title, faint("Nothing is clipped: scales cover all weights."))
    names = [f"{low:g} to {high:g}" for low, high in pairwise(CLIP_BINS)]
    columns = dict(zip([*names, "not clipped"], totals, strict=True))
    return section(
        title,
        faint("Each scale as a part of the one that covers all weights under it."),
        charts.histogram("Clips", columns, x_label="part of the covering scale", series=1),
        table(["kind", "clipped", "of scales"], rows),
    )


def every_layer(findings: Findings) -> Markup:
    """All numbers of all layers, folded away."""
    rows = []
    for layer in findings.layers:
        before, after = layer.inputs or (None, None)
        rows.append(
            (
                layer.name,
                f"{layer.shape[0]} x {layer.shape[1]}",
                layer.scheme,
                number(_error(layer)),
                number(layer.recomputed) if not layer.rewritten else "rewritten",
                number(layer.loss),
                *(_span(told) for told in layer.weights),
                *("-" if r is None else span(r.low, r.high) for r in (before, after)),
            )
        )
    head = ["layer", "shape", "scheme", "error", "error, recomputed", "error of outputs"]
    head += ["float weights", "quantized weights", "inputs before", "inputs after"]
    told = f"All {len(rows)} quantized layers"
    return section("Layers", tag("details", tag("summary", told), table(head, rows)))


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
