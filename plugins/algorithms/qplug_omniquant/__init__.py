"""OmniQuant: learn clips of weights and scales of inputs, block by block."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from qplug import Algorithm, hookimpl


@hookimpl
def qplug_algorithms() -> Iterable[type[Algorithm[Any]]]:
    from qplug_omniquant.omniquant import OmniQuant

    return [OmniQuant]
