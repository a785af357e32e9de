"""SmoothQuant: move the outliers of inputs into the weights that read them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from qplug import Algorithm, hookimpl


@hookimpl
def qplug_algorithms() -> Iterable[type[Algorithm[Any]]]:
    from qplug_smoothquant.smoothquant import SmoothQuant

    return [SmoothQuant]
