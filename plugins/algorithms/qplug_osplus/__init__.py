"""Outlier Suppression+: shift and scale inputs until their outliers are gone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from qplug import Algorithm, hookimpl


@hookimpl
def qplug_algorithms() -> Iterable[type[Algorithm[Any]]]:
    from qplug_osplus.osplus import OSPlus

    return [OSPlus]
