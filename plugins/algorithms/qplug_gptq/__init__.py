"""GPTQ: round column by column, and push each error onto the columns still to come."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from qplug import Algorithm, Suggestion, hookimpl


@hookimpl
def qplug_algorithms() -> Iterable[type[Algorithm[Any]]]:
    from qplug_gptq.gptq import GPTQ

    return [GPTQ]


@hookimpl
def qplug_suggestions() -> Iterable[Suggestion]:
    # benchmarks/RESULTS.md, W4A16 g128, NVFP4A16 and MXFP4A16 of the 18.9-million-parameter model
    return [
        Suggestion("gptq", "few-bit integers", loss=0.57, usual=True),
        Suggestion("gptq", "few-bit floats", loss=0.68, usual=True),
    ]
