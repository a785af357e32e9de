"""SmoothQuant: move the outliers of inputs into the weights that read them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from qplug import Algorithm, Suggestion, hookimpl


@hookimpl
def qplug_algorithms() -> Iterable[type[Algorithm[Any]]]:
    from qplug_smoothquant.smoothquant import SmoothQuant

    return [SmoothQuant]


@hookimpl
def qplug_suggestions() -> Iterable[Suggestion]:
    # benchmarks/RESULTS.md, W8A8 of the outlier twin
    return [
        Suggestion("smoothquant", "integer inputs", loss=0.04),
    ]
