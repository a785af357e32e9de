"""Compares folders on one page: their sizes, errors and perplexities."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from qplug.report import charts
from qplug.report.findings import Overview
from qplug.report.rendering import render
from qplug.report.words import bits, number, size, text_of

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
    """Returns an HTML file with a table, and with a plot if any perplexity was measured."""
    measured = [(folder, folder.evaluation) for folder in compared if folder.evaluation is not None]
    values = {
        "columns": COLUMNS,
        "rows": [folder.cells() for folder in compared],
        "plot": _plot(measured) if measured else None,
        "text": text_of(measured[0][1]) if measured else None,
    }
    return str(render("comparison.html.jinja", values))


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
