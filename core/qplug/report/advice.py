"""The worst layers of a folder, and what to do about them, as commands that are ready to run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qplug.recipe.recipe import Recipe
from qplug.report.findings import Findings
from qplug.report.remedies import command
from qplug.report.tables import Cell, Table
from qplug.report.words import number
from qplug.report.worst import FACTOR, rank_error, ranked, standing_out, typical

#: The layers that are listed if none stands out.
_FEW = 3


@dataclass(frozen=True)
class Step:
    """Something to do: a sentence, and a line for a shell."""

    sentence: str
    command: str


@dataclass(frozen=True)
class WorstLayers:
    """The layers with the largest errors, a sentence on them, and what to do, the best first."""

    sentence: str
    table: Table
    steps: Sequence[Step]


def worst_layers(findings: Findings) -> WorstLayers | None:
    """Returns the worst layers of a folder; None if no error is known."""
    usual = typical(findings.layers)
    if usual is None:
        return None
    far = standing_out(findings.layers)
    shown = far or ranked(findings.layers)[:_FEW]
    what = "outputs" if shown[0].loss is not None else "weights"
    rows = []
    for layer in shown:
        error = rank_error(layer) or 0.0
        times = error / usual if usual else 1.0
        to_try = _to_try(findings.options.get(layer.name, ()))
        rows.append((layer.name, Cell(number(error), error), Cell(f"{times:.2f}", times), to_try))
    head = ["layer", f"error of {what}", "times the median", "to try"]
    table = Table(f"The largest errors of {what}", head, rows, sortable=True)
    return WorstLayers(_sentence(len(far), rows[0][2].text, usual, what), table, _steps(findings))


def _to_try(options: Sequence[str]) -> str:
    """Returns what ``options`` of ``qplug quantize``, flags and their values, store of layers."""
    if not options:
        return "-"
    layers = len(options) // 2
    how = options[-1].rpartition("=")[2] if options[0] == "--override" else "float"
    return how if layers == 1 else f"{how}, with {layers - 1} merged"


def _sentence(far: int, times: str, usual: float, what: str) -> str:
    median = f"the median error of {what}, {number(usual)}"
    if not far:
        return (
            f"No layer stands out: the largest error is {times} times {median}. More bits for "
            "single layers gain little."
        )
    layers = "One layer stands out: its error is" if far == 1 else f"{far} layers stand out:"
    rest = "" if far == 1 else " their errors are"
    return f"{layers}{rest} {FACTOR:g} times {median}, or more."


def _steps(findings: Findings) -> list[Step]:
    overview = findings.overview
    model = findings.against or overview.model
    if not overview.recipe or model is None:
        return []
    recipe, out = Recipe.from_dict(overview.recipe), str(Path(overview.folder).absolute())
    found = []
    options: dict[tuple[str, str], None] = {}  # layers that are merged name the same ones
    for words in findings.options.values():
        options |= dict.fromkeys(zip(words[::2], words[1::2], strict=True))
    if options:
        line = command(recipe, model, f"{out}-mixed", options=[w for pair in options for w in pair])
        found.append(("Store these layers, and those merged with them, in more bits:", line))
    if findings.algorithm is not None:
        name = findings.algorithm.replace("+", "-")
        line = command(recipe, model, f"{out}-{name}", algorithm=findings.algorithm)
        found.append((f"Choose better codes for all layers, with {findings.algorithm}:", line))
    return [Step(sentence, line) for sentence, line in found if line is not None]
