"""The plugin of the hf backend, which writes the float weights after all transforms."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from qplug import Exporter, hookimpl


@hookimpl
def qplug_exporters() -> Iterable[type[Exporter[Any]]]:
    from qplug_hf.exporter import HuggingFace

    return [HuggingFace]
