"""AWQ: scale up the columns that carry large inputs, and clip ranges, before rounding."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from qplug import Algorithm, hookimpl


@hookimpl
def qplug_algorithms() -> Iterable[type[Algorithm[Any]]]:
    from qplug_awq.awq import AWQ

    return [AWQ]
