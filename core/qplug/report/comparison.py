"""Several folders side by side: their sizes, errors and perplexities."""

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

#: What is said of each folder, in order.
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
        """A row under ``COLUMNS``."""
        overview, found = self.overview, self.evaluation
        return (
            self.name,
            " + ".join(overview.recipe.get("algorithms", ())) or "-",
            ", ".join(overview.schemes) or "float",
            overview.backend or "-",
            size(overview.bytes.total),
            bits(overview.bits_per_parameter),
            number(_mean(overview.errors.values())),
            number(_mean(overview.losses.values())),
            "-" if found is None else f"{found.perplexity:.4f}",
        )

    def plain(self) -> dict[str, Any]:
        """For JSON."""
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
    """A whole HTML file: a plot if perplexities were measured, and a table."""
    measured = [(one, one.evaluation) for one in compared if one.evaluation is not None]
    values = {
        "columns": COLUMNS,
        "rows": [one.cells() for one in compared],
        "plot": _plot(measured) if measured else None,
        "text": text_of(measured[0][1]) if measured else None,
    }
    return str(render("comparison.html.jinja", values))


def _plot(measured: Sequence[tuple[Compared, Evaluation]]) -> Markup:
    points = [
        charts.Point(one.overview.bytes.total, found.perplexity, one.name, place)
        for place, (one, found) in enumerate(measured)
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
    found = list(values)
    return fmean(found) if found else None
