"""The plugin of the AWQ format, which vLLM and SGLang load."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from qplug import Exporter, hookimpl


@hookimpl
def qplug_exporters() -> Iterable[type[Exporter[Any]]]:
    from qplug_awq_format.exporter import AWQExporter

    return [AWQExporter]
