"""The report on one folder, as a page: its numbers; ``report.html.jinja`` has its sentences."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qplug.report import charts, layers
from qplug.report.findings import Bytes, Findings
from qplug.report.layers import Charted
from qplug.report.rendering import render
from qplug.report.words import bits, number, recipe_rows, size, text_of

if TYPE_CHECKING:
    from qplug.api.events import StageCost
    from qplug.reading.perplexity import Evaluation

_PARTS = ("quantized layers", "other linear layers", "embeddings, norms, the rest")

#: What is counted to each stage of a run.
_STAGES = {
    "reading": "waiting for weights from the disk",
    "statistics": "passing calibration data through the float blocks",
    "transform": "scales that algorithms move, clips that they choose",
    "quantize": "computing codes",
    "errors": "comparing with the float weights and what they compute",
    "pack": "bringing codes into the backend's format",
    "passing on": "passing calibration data through the quantized blocks",
    "writing": "waiting for the disk to take what is written",
}


def report_page(
    findings: Findings,
    *,
    measured: Mapping[str, Sequence[Evaluation]] | None = None,
    stages: Sequence[StageCost] = (),
    seconds: float | None = None,
) -> str:
    """A whole HTML file.

    ``measured``: perplexities by what they are of, such as ``float`` and ``quantized``. ``stages``
    and ``seconds`` are those of the run, if it is known (``Result`` has them).
    """
    overview = findings.overview
    values = {
        "name": Path(overview.folder).name or overview.folder,
        "overview": overview,
        "findings": findings,
        "schemes": ", ".join(overview.schemes) or "float",
        "tiles": [*_tiles(findings, measured or {})],
        "recipe": _recipe(findings),
        "plain_recipe": json.dumps(dict(overview.recipe), indent=2, ensure_ascii=False),
        "sizes": _sizes(findings),
        "output_errors": layers.output_errors(findings),
        "weight_errors": layers.weight_errors(findings),
        "weights": layers.weights(findings),
        "inputs": layers.inputs(findings),
        "scales": layers.scales(findings),
        "clips": layers.clips(findings),
        "perplexities": [*_perplexities(measured or {})],
        "stages": None if seconds is None or not stages else _stages(stages, seconds),
        "layers": [*layers.every_layer(findings)],
    }
    return str(render("report.html.jinja", values))


def _tiles(
    findings: Findings, measured: Mapping[str, Sequence[Evaluation]]
) -> Iterator[tuple[str, str]]:
    overview = findings.overview
    yield "size", size(overview.bytes.total)
    if findings.float_bytes is not None:
        yield "of the float model", f"{overview.bytes.total / findings.float_bytes.total:.1%}"
    yield "bits per quantized weight", bits(overview.bits_per_weight)
    errors = overview.losses or overview.errors
    if errors:
        of = "outputs" if overview.losses else "weights"
        yield f"mean error of {of}", number(sum(errors.values()) / len(errors))
    if "quantized" in measured:
        yield "perplexity", f"{measured['quantized'][0].perplexity:.4f}"


def _recipe(findings: Findings) -> Sequence[tuple[str, str]]:
    overview = findings.overview
    if not overview.recipe:
        return ()
    versions = ", ".join(f"{name} {version}" for name, version in overview.versions.items())
    model = ("model", overview.model or "")
    return [model, *recipe_rows(overview.recipe), ("versions", versions)]


def _sizes(findings: Findings) -> Charted:
    folders = {"this folder": findings.overview.bytes}
    if findings.float_bytes is not None:
        folders = {"float model": findings.float_bytes, **folders}
    bars = {name: [_stacked(held)] for name, held in folders.items()}
    rows = [
        (part, *(size(_parts(held)[place]) for held in folders.values()))
        for place, part in enumerate(_PARTS)
    ]
    rows.append(("all tensors", *(size(held.total) for held in folders.values())))
    chart = charts.rows("Bytes of tensors", bars, legend=_PARTS, format_=size)
    return Charted(chart, ["", *folders], rows)


def _parts(held: Bytes) -> tuple[int, int, int]:
    return held.quantized, held.linears, held.others


def _stacked(held: Bytes) -> list[charts.Bar]:
    bars, low = [], 0
    for series, (part, count) in enumerate(zip(_PARTS, _parts(held), strict=True)):
        if count:
            title = f"{part}: {size(count)}"
            bars.append(charts.Bar(series, float(low), float(low + count), title))
        low += count
    return bars


def _perplexities(
    measured: Mapping[str, Sequence[Evaluation]],
) -> Iterator[tuple[str, str, str, str]]:
    before = {text_of(e): e.perplexity for e in measured.get("float", ())}
    for model, evaluations in measured.items():
        for found in evaluations:
            base = before.get(text_of(found))
            change = "-" if base is None else f"{found.perplexity / base - 1:+.2%}"
            yield model, f"{found.perplexity:.4f}", change, text_of(found)


def _stages(stages: Sequence[StageCost], seconds: float) -> Charted:
    bars = {
        stage.name: [[charts.Bar(0, 0.0, stage.seconds, f"{stage.seconds:.2f} s")]]
        for stage in stages
    }
    rest = max(0.0, seconds - sum(stage.seconds for stage in stages))
    rows = [
        (
            stage.name,
            f"{stage.seconds:.2f} s",
            _memory(stage.memory),
            _memory(stage.gpu_memory),
            _STAGES.get(stage.name, ""),
        )
        for stage in stages
    ]
    other = "checks, calibration text, what comes before the first block"
    rows.append(("all else", f"{rest:.2f} s", "-", "-", other))
    rows.append(("all", f"{seconds:.2f} s", *_most(stages), ""))
    chart = charts.rows("Seconds by stage", bars, legend=(), format_=lambda tick: f"{tick:.4g} s")
    return Charted(chart, ["stage", "time", "memory", "GPU memory", ""], rows)


def _memory(count: int | None) -> str:
    return "-" if count is None else size(count)


def _most(stages: Sequence[StageCost]) -> tuple[str, str]:
    memory = [stage.memory for stage in stages if stage.memory is not None]
    gpu_memory = [stage.gpu_memory for stage in stages if stage.gpu_memory is not None]
    return _memory(max(memory, default=None)), _memory(max(gpu_memory, default=None))
