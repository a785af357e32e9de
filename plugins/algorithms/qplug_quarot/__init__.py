"""QuaRot: rotate the residual stream, so that no channel stands out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from qplug import Algorithm, hookimpl


@hookimpl
def qplug_algorithms() -> Iterable[type[Algorithm[Any]]]:
    from qplug_quarot.quarot import QuaRot

    return [QuaRot]
