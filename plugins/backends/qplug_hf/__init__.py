"""The hf backend: the float checkpoint that algorithms made of the model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from qplug import Exporter, hookimpl


@hookimpl
def qplug_exporters() -> Iterable[type[Exporter[Any]]]:
    from qplug_hf.exporter import HuggingFace

    return [HuggingFace]
