"""HQQ: scales and zero points under which the errors of rounding are sparse; no data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from qplug import Algorithm, hookimpl


@hookimpl
def qplug_algorithms() -> Iterable[type[Algorithm[Any]]]:
    from qplug_hqq.hqq import HQQ

    return [HQQ]
