"""MagR: make ranges of weights smaller before they are rounded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from qplug import Algorithm, hookimpl


@hookimpl
def qplug_algorithms() -> Iterable[type[Algorithm[Any]]]:
    from qplug_magr.magr import MagR

    return [MagR]
