"""The report on one folder, as a page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qplug.report import charts, layers
from qplug.report.findings import Bytes, Findings
from qplug.report.frame import document
from qplug.report.layers import faint, section
from qplug.report.markup import Markup, table, tag
from qplug.report.words import bits, number, recipe_rows, size

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
    title = Path(overview.folder).name or overview.folder
    schemes = ", ".join(overview.schemes) or "float"
    made = f"{overview.model or overview.architecture}, {schemes}, for {overview.backend}"
    return document(
        f"{title}: qplug report",
        tag("header", tag("h1", title), tag("p", made, class_="faint")),
        _tiles(findings, measured or {}),
        _recipe(findings),
        _sizes(findings),
        layers.errors(findings),
        layers.weights(findings),
        layers.inputs(findings),
        layers.scales(findings),
        layers.clips(findings),
        _perplexity(measured or {}),
        _stages(stages, seconds),
        _serving(findings),
        layers.every_layer(findings),
    )


def _tiles(findings: Findings, measured: Mapping[str, Sequence[Evaluation]]) -> Markup:
    overview = findings.overview
    told: list[tuple[str, str]] = [("size", size(overview.bytes.total))]
    if findings.float_bytes is not None:
        share = overview.bytes.total / findings.float_bytes.total
        told.append(("of the float model", f"{share:.1%}"))
    told.append(("bits per quantized weight", bits(overview.bits_per_weight)))
    found = overview.losses or overview.errors
    if found:
        what = "outputs" if overview.losses else "weights"
        told.append((f"mean error of {what}", number(sum(found.values()) / len(found))))
    if "quantized" in measured:
        told.append(("perplexity", f"{measured['quantized'][0].perplexity:.4f}"))
    return tag("dl", [tag("div", tag("dt", k), tag("dd", v)) for k, v in told], class_="tiles")


def _recipe(findings: Findings) -> Markup:
    overview = findings.overview
    if not overview.recipe:
        return section("Recipe", tag("p", "Not known: qplug did not write this folder."))
    rows = [("model", overview.model or ""), *recipe_rows(overview.recipe)]
    rows.append(("versions", ", ".join(f"{k} {v}" for k, v in overview.versions.items())))
    plain = json.dumps(dict(overview.recipe), indent=2, ensure_ascii=False)
    return section(
        "Recipe",
        _words(rows),
        [tag("p", f"Note: {note}") for note in overview.notes],
        tag("details", tag("summary", "As qplug.json has it"), tag("pre", plain)),
    )


def _words(rows: Sequence[tuple[str, str]]) -> Markup:
    body = [tag("tr", tag("th", name, scope="row"), tag("td", told)) for name, told in rows]
    return tag("table", tag("tbody", body), class_="words")


def _sizes(findings: Findings) -> Markup:
    overview = findings.overview
    folders = {"this folder": overview.bytes}
    if findings.float_bytes is not None:
        folders = {"float model": findings.float_bytes, **folders}
    bars = {name: [_stacked(held)] for name, held in folders.items()}
    rows = [
        (part, *(size(_parts(held)[number]) for held in folders.values()))
        for number, part in enumerate(_PARTS)
    ]
    rows.append(("all tensors", *(size(held.total) for held in folders.values())))
    per_weight = [
        ("a quantized weight, scales included", bits(overview.bits_per_weight)),
        ("a weight of any linear layer", bits(overview.bits_per_linear_weight)),
        ("any parameter", bits(overview.bits_per_parameter)),
    ]
    return section(
        "Size",
        charts.rows("Bytes of tensors", bars, legend=_PARTS, format_=size),
        table(["", *folders], rows),
        tag("h3", "Bits"),
        table(["bits of", "this folder"], per_weight),
    )


def _parts(held: Bytes) -> tuple[int, int, int]:
    return held.quantized, held.linears, held.others


def _stacked(held: Bytes) -> list[charts.Bar]:
    bars, low = [], 0
    for number_, (part, count) in enumerate(zip(_PARTS, _parts(held), strict=True)):
        if count:
            told = f"{part}: {size(count)}"
            bars.append(charts.Bar(number_, float(low), float(low + count), told))
        low += count
    return bars


def _perplexity(measured: Mapping[str, Sequence[Evaluation]]) -> Markup:
    if not any(measured.values()):
        told = "Not measured. qplug report DIR --perplexity measures it, beside the float model's."
        return section("Perplexity", faint(told))
    before = {_text(e): e.perplexity for e in measured.get("float", ())}
    rows = []
    for what, evaluations in measured.items():
        for found in evaluations:
            base = before.get(_text(found))
            change = "-" if base is None else f"{found.perplexity / base - 1:+.2%}"
            rows.append((what, f"{found.perplexity:.4f}", change, _text(found)))
    return section("Perplexity", table(["model", "perplexity", "against float", "text"], rows))


def _text(found: Evaluation) -> str:
    return f"{found.windows} windows of {found.seq_len} tokens of {found.dataset}"


def _stages(stages: Sequence[StageCost], seconds: float | None) -> Markup:
    title = "Time and memory by stage"
    if not stages or seconds is None:
        told = (
            "Not known: a folder says nothing of when or how it was made. "
            "qplug quantize --report tells them as it quantizes."
        )
        return section(title, faint(told))
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
    return section(
        title,
        charts.rows("Seconds by stage", bars, legend=(), format_=lambda tick: f"{tick:.4g} s"),
        table(["stage", "time", "memory", "GPU memory", ""], rows),
        faint("Memory is the most that was seen while a stage was at work."),
    )


def _memory(count: int | None) -> str:
    return "-" if count is None else size(count)


def _most(stages: Sequence[StageCost]) -> tuple[str, str]:
    memory = [stage.memory for stage in stages if stage.memory is not None]
    gpu_memory = [stage.gpu_memory for stage in stages if stage.gpu_memory is not None]
    return _memory(max(memory, default=None)), _memory(max(gpu_memory, default=None))


def _serving(findings: Findings) -> Markup:
    overview = findings.overview
    if overview.serve is None:
        told = f"No engine serves what {overview.backend} writes; measure it with qplug eval."
        return section("How to serve", tag("p", told))
    return section("How to serve", tag("pre", overview.serve))
