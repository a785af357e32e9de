"""AWQ: scale up the columns that carry large inputs, and clip ranges, before rounding."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from qplug import Algorithm, Suggestion, hookimpl


@hookimpl
def qplug_algorithms() -> Iterable[type[Algorithm[Any]]]:
    from qplug_awq.awq import AWQ

    return [AWQ]


@hookimpl
def qplug_suggestions() -> Iterable[Suggestion]:
    # benchmarks/RESULTS.md, W4A16 g128 of the 18.9-million-parameter model, means over seeds
    return [
        Suggestion("awq", "few-bit integers", loss=0.74),
        Suggestion("awq+gptq", "few-bit integers", loss=0.59),
    ]
