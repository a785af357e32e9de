"""GPTQ: round column by column, and push each error onto the columns still to come."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from qplug import Algorithm, hookimpl


@hookimpl
def qplug_algorithms() -> Iterable[type[Algorithm[Any]]]:
    from qplug_gptq.gptq import GPTQ

    return [GPTQ]
