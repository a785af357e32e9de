"""SpinQuant: learn how the residual stream and heads are rotated."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from qplug import Algorithm, hookimpl


@hookimpl
def qplug_algorithms() -> Iterable[type[Algorithm[Any]]]:
    from qplug_spinquant.spinquant import SpinQuant

    return [SpinQuant]
