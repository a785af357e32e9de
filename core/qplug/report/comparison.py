"""Compares folders on one page: their sizes, perplexities, recipes, and the errors of layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from qplug.report import charts
from qplug.report.findings import Overview
from qplug.report.layers import by_depth
from qplug.report.rendering import render
from qplug.report.tables import Cell, Table
from qplug.report.words import bits, number, recipe_rows, size, text_of

if TYPE_CHECKING:
    from markupsafe import Markup

    from qplug.reading.perplexity import Evaluation

#: The columns of the table, which has a row for each folder.
COLUMNS = (
    *("folder", "algorithms", "scheme", "backend", "size", "bits per parameter"),
    *("error of weights", "error of outputs", "perplexity"),
)


@dataclass(frozen=True)
class Compared:
    """A folder, and its perplexity if it was measured."""

    overview: Overview
    evaluation: Evaluation | None = None

    @property
    def name(self) -> str:
        return self.overview.folder

    def cells(self) -> tuple[str, ...]:
        """The row of this folder, with a cell for each of ``COLUMNS``."""
        overview, evaluation = self.overview, self.evaluation
        return (
            self.name,
            " + ".join(overview.recipe.get("algorithms", ())) or "-",
            ", ".join(overview.schemes) or "float",
            overview.backend or "-",
            size(overview.bytes.total),
            bits(overview.bits_per_parameter),
            number(_mean(overview.errors.values())),
            number(_mean(overview.losses.values())),
            "-" if evaluation is None else f"{evaluation.perplexity:.4f}",
        )

    def numbers(self) -> tuple[float | None, ...]:
        """The numbers of ``cells`` by which its columns are sorted; None for text."""
        overview, evaluation = self.overview, self.evaluation
        return (
            *(None, None, None, None),
            overview.bytes.total,
            overview.bits_per_parameter,
            _mean(overview.errors.values()),
            _mean(overview.losses.values()),
            evaluation.perplexity if evaluation else None,
        )

    def plain(self) -> dict[str, Any]:
        """Returns the same values, unrounded, as a mapping for JSON."""
        overview = self.overview
        return {
            "folder": self.name,
            "model": overview.model,
            "algorithms": list(overview.recipe.get("algorithms", ())),
            "schemes": dict(overview.schemes),
            "backend": overview.backend,
            "bytes": overview.bytes.total,
            "bits per parameter": overview.bits_per_parameter,
            "bits per quantized weight": overview.bits_per_weight,
            "mean error of weights": _mean(overview.errors.values()),
            "mean error of outputs": _mean(overview.losses.values()),
            "perplexity": self.evaluation.perplexity if self.evaluation else None,
        }


def comparison_page(compared: Sequence[Compared]) -> str:
    """Returns an HTML file with a table, and a chart of each number that several folders have."""
    measured = [(folder, folder.evaluation) for folder in compared if folder.evaluation is not None]
    titles = _titles(compared)
    values = {
        "title": " and ".join(titles) if len(titles) == 2 else f"{len(titles)} models side by side",
        "sentences": _sentences(compared, titles) if len(titles) == 2 else [],
        "table_of_models": Table("Models side by side", COLUMNS, _cells(compared), sortable=True),
        "plot": _plot(measured) if measured else None,
        "text": text_of(measured[0][1]) if measured else None,
        "recipes": _recipes(compared, titles),
        "output_errors": _errors("outputs", {n: c.overview for n, c in _named(compared, titles)}),
        "weight_errors": _errors("weights", {n: c.overview for n, c in _named(compared, titles)}),
        "layers": _layers(compared, titles) if len(titles) == 2 else None,
    }
    return str(render("comparison.html.jinja", values))


def _named(compared: Sequence[Compared], titles: Sequence[str]) -> Iterator[tuple[str, Compared]]:
    yield from zip(titles, compared, strict=True)


def _titles(compared: Sequence[Compared]) -> list[str]:
    """Returns a short name for each folder: the last part of its path, where these differ."""
    names = [Path(folder.name).name or folder.name for folder in compared]
    if len({*names}) == len(names):
        return names
    whole = [folder.name for folder in compared]
    if len({*whole}) == len(whole):
        return whole
    return [f"{name} ({number})" for number, name in enumerate(whole, start=1)]


def _cells(compared: Sequence[Compared]) -> list[list[str | Cell]]:
    """Returns the rows of the table, with the numbers that cells are sorted by."""
    return [
        [Cell(text, value) for text, value in zip(folder.cells(), folder.numbers(), strict=True)]
        for folder in compared
    ]


def _sentences(compared: Sequence[Compared], titles: Sequence[str]) -> list[str]:
    """Returns how the second folder differs from the first, in sentences."""
    told = []
    for what, column in (
        ("the bytes", "size"),
        ("the perplexity", "perplexity"),
        ("the mean error of outputs", "error of outputs"),
        ("the mean error of weights", "error of weights"),
    ):
        before, after = (folder.numbers()[COLUMNS.index(column)] for folder in compared)
        if before and after:
            told.append(f"{titles[1]} has {after / before:.1%} of {what} of {titles[0]}.")
    return told


def _recipes(compared: Sequence[Compared], titles: Sequence[str]) -> Table | None:
    """Returns the keywords of the recipes that differ; None if fewer than two recipes are known."""
    known = [
        (title, dict(recipe_rows(folder.overview.recipe)))
        for title, folder in _named(compared, titles)
        if folder.overview.recipe
    ]
    if len(known) < 2:
        return None
    rows = [
        (word, *(recipe.get(word, "-") for _, recipe in known))
        for word in dict.fromkeys(word for _, recipe in known for word in recipe)
        if len({recipe.get(word) for _, recipe in known}) > 1
    ]
    return Table("What differs in the recipes", ["keyword", *(t for t, _ in known)], rows)


def _errors(what: str, overviews: Mapping[str, Overview]) -> Markup | None:
    """Returns a chart for each kind of layer, with a line for each folder over the blocks.

    None is returned if fewer than two folders have such errors.
    """
    series: dict[str, dict[str, Sequence[float | None]]] = {}
    for title, overview in overviews.items():
        errors = overview.losses if what == "outputs" else overview.errors
        places = [
            (*overview.places[n], error) for n, error in errors.items() if n in overview.places
        ]
        for kind, means in by_depth(places).items():
            series.setdefault(kind, {})[title] = means
    if not any(len(lines) > 1 for lines in series.values()):
        return None
    # Every chart has all lines, so that a folder has the same colour in each.
    lines = {
        kind: {title: own.get(title, ()) for title in overviews} for kind, own in series.items()
    }
    return charts.panels(f"Relative error of {what}", lines, x_label="block", format_=number)


def _layers(compared: Sequence[Compared], titles: Sequence[str]) -> Table | None:
    """Returns the errors of the layers that two folders quantize, and the ratio of the errors.

    These are errors of outputs if both folders have them, else of weights.
    """
    first, second = (folder.overview for folder in compared)
    both_measured = bool(first.losses and second.losses)
    before, after = (
        (first.losses, second.losses) if both_measured else (first.errors, second.errors)
    )
    ratios = {n: after[n] / before[n] for n in before if n in after and before[n]}
    if not ratios:
        return None
    rows = [
        (
            name,
            Cell(number(before[name]), before[name]),
            Cell(number(after[name]), after[name]),
            Cell(f"{ratio:.2f}", ratio),
        )
        for name, ratio in sorted(ratios.items(), key=lambda item: item[1], reverse=True)
    ]
    what = "outputs" if both_measured else "weights"
    caption = f"Relative errors of {what}; the layers that {titles[1]} worsens most are first"
    return Table(caption, ["layer", *titles, "ratio"], rows, sortable=True)


def _plot(measured: Sequence[tuple[Compared, Evaluation]]) -> Markup:
    points = [
        charts.Point(folder.overview.bytes.total, evaluation.perplexity, folder.name, number)
        for number, (folder, evaluation) in enumerate(measured)
    ]
    return charts.scatter(
        "Size against perplexity",
        points,
        x_label="bytes of all tensors",
        y_label="Perplexity",
        x_format=size,
        y_format=number,
    )


def _mean(values: Iterable[float]) -> float | None:
    numbers = list(values)
    return fmean(numbers) if numbers else None
