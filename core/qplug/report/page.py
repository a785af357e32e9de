"""Renders the report on one folder: numbers come from here, texts from ``report.html.jinja``."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qplug.checkpoint.locate import as_word
from qplug.output.measured import Measured
from qplug.report import charts, layers
from qplug.report.advice import worst_layers
from qplug.report.findings import Bytes, Findings, Overview
from qplug.report.layers import Charted
from qplug.report.measured import measured_perplexity
from qplug.report.page_file import quality_mark
from qplug.report.rendering import render
from qplug.report.tables import Table
from qplug.report.words import bits, number, recipe_rows, size, text_of

if TYPE_CHECKING:
    from qplug.api.events import StageCost
    from qplug.reading.perplexity import Evaluation

#: Names of the fields of ``Bytes``, in their order.
_CATEGORIES = ("quantized layers", "other linear layers", "embeddings, norms, the rest")

#: Explanations of the stages of a run.
_STAGES = {
    "reading": "waiting for weights from the disk",
    "statistics": "passing calibration data through the float blocks",
    "transform": "moving scale between layers, choosing clips",
    "quantize": "computing codes",
    "errors": "comparing with the float weights and their outputs",
    "pack": "converting codes to the backend's format",
    "passing on": "passing calibration data through the quantized blocks",
    "writing": "waiting for the disk to store tensors",
}


def report_page(
    findings: Findings,
    *,
    measured: Mapping[str, Sequence[Evaluation]] | None = None,
    quality: Measured | None = None,
    stages: Sequence[StageCost] = (),
    seconds: float | None = None,
) -> str:
    """Returns an HTML file with the report on ``findings``.

    ``measured`` are perplexities by model, which is ``float`` or ``quantized``. ``quality`` is the
    quality on top of the page, by default what ``measured`` shows of it. ``stages`` and ``seconds``
    are the costs of the run that wrote the folder, from its ``Result``, if they are known.
    """
    overview = findings.overview
    quality = quality or measured_perplexity(measured or {})
    values = {
        "name": Path(overview.folder).name or overview.folder,
        "overview": overview,
        "findings": findings,
        "schemes": ", ".join(overview.schemes) or "float",
        "quality": quality,
        "quality_mark": quality_mark(quality, overview.identity) if quality else None,
        "measure": shlex.join(["qplug", "report", as_word(overview.folder), "--check"]),
        "tiles": [*_tiles(findings, quality)],
        "worst": worst_layers(findings),
        "recipe": _recipe(findings),
        "plain_recipe": json.dumps(dict(overview.recipe), indent=2, ensure_ascii=False),
        "sizes": _sizes(findings),
        "bits": _bits(overview),
        "output_errors": layers.output_errors(findings),
        "weight_errors": layers.weight_errors(findings),
        "weights": layers.weights(findings),
        "inputs": layers.inputs(findings),
        "scales": layers.scales(findings),
        "clips": layers.clips(findings),
        "experts": layers.experts(findings),
        "perplexities": _perplexities(measured or {}),
        "stages": None if seconds is None or not stages else _stages(stages, seconds),
        "layers": layers.every_layer(findings),
    }
    return str(render("report.html.jinja", values))


def _tiles(findings: Findings, quality: Measured | None) -> Iterator[tuple[str, str]]:
    """Yields the most important numbers of the page, with their names."""
    overview = findings.overview
    yield "size", size(overview.bytes.total)
    if findings.float_bytes is not None:
        yield "of the float model", f"{overview.bytes.total / findings.float_bytes.total:.1%}"
    yield "bits per quantized weight", bits(overview.bits_per_weight)
    errors = overview.losses or overview.errors
    if errors:
        compared = "outputs" if overview.losses else "weights"
        yield f"mean error of {compared}", number(sum(errors.values()) / len(errors))
    if quality is not None and quality.perplexity is not None:
        yield "perplexity", f"{quality.perplexity:.4f}"


def _recipe(findings: Findings) -> Table | None:
    """Returns the table of the recipe; None if the recipe is not known."""
    overview = findings.overview
    if not overview.recipe:
        return None
    versions = ", ".join(f"{name} {version}" for name, version in overview.versions.items())
    model = ("model", overview.model or "")
    rows = [model, *recipe_rows(overview.recipe), ("versions", versions)]
    return Table("How the folder was made", ["keyword", "value"], rows)


def _bits(overview: Overview) -> Table:
    rows = [
        ("quantized weight, scales included", bits(overview.bits_per_weight)),
        ("weight of any linear layer", bits(overview.bits_per_linear_weight)),
        ("parameter of any kind", bits(overview.bits_per_parameter)),
    ]
    return Table("Bits per weight", ["bits per", "this folder"], rows)


def _sizes(findings: Findings) -> Charted:
    """Returns a chart of the bytes by category, of this folder and of the float model."""
    folders = {"this folder": findings.overview.bytes}
    if findings.float_bytes is not None:
        folders = {"float model": findings.float_bytes, **folders}
    bars = {name: [_stacked(sizes)] for name, sizes in folders.items()}
    rows = [
        (category, *(size(_by_category(sizes)[number]) for sizes in folders.values()))
        for number, category in enumerate(_CATEGORIES)
    ]
    rows.append(("all tensors", *(size(sizes.total) for sizes in folders.values())))
    chart = charts.rows("Bytes of tensors", bars, legend=_CATEGORIES, format_=size)
    return Charted(chart, Table("Bytes of tensors, by kind", ["tensors", *folders], rows))


def _by_category(sizes: Bytes) -> tuple[int, int, int]:
    return sizes.quantized, sizes.linears, sizes.others


def _stacked(sizes: Bytes) -> list[charts.Bar]:
    """Returns a bar for each category, one after the other."""
    bars, low = [], 0
    for series, (category, count) in enumerate(zip(_CATEGORIES, _by_category(sizes), strict=True)):
        if count:
            title = f"{category}: {size(count)}"
            bars.append(charts.Bar(series, float(low), float(low + count), title))
        low += count
    return bars


def _perplexities(measured: Mapping[str, Sequence[Evaluation]]) -> Table | None:
    """Returns a table of model, perplexity, change against the float model, and text."""
    floats = {text_of(e): e.perplexity for e in measured.get("float", ())}
    rows = []
    for model, evaluations in measured.items():
        for evaluation in evaluations:
            base = floats.get(text_of(evaluation))
            change = "-" if base is None else f"{evaluation.perplexity / base - 1:+.2%}"
            rows.append((model, f"{evaluation.perplexity:.4f}", change, text_of(evaluation)))
    head = ["model", "perplexity", "against float", "text"]
    return Table("Perplexities", head, rows) if rows else None


def _stages(stages: Sequence[StageCost], seconds: float) -> Charted:
    """Returns a chart of the seconds by stage, of a run that took ``seconds`` in all."""
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
    other = "checks, calibration text, work before the first block"
    rows.append(("all else", f"{rest:.2f} s", "-", "-", other))
    rows.append(("all", f"{seconds:.2f} s", *_most(stages), ""))
    chart = charts.rows("Seconds by stage", bars, legend=(), format_=lambda tick: f"{tick:.4g} s")
    head = ["stage", "time", "memory", "GPU memory", "work"]
    return Charted(chart, Table("Time and peak memory by stage", head, rows))


def _memory(count: int | None) -> str:
    return "-" if count is None else size(count)


def _most(stages: Sequence[StageCost]) -> tuple[str, str]:
    """Returns the largest memory and GPU memory of all stages."""
    memory = [stage.memory for stage in stages if stage.memory is not None]
    gpu_memory = [stage.gpu_memory for stage in stages if stage.gpu_memory is not None]
    return _memory(max(memory, default=None)), _memory(max(gpu_memory, default=None))
