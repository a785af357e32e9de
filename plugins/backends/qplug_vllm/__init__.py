"""The plugin of the vllm backend, which writes folders for vLLM's loader and kernels."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from qplug import Exporter, hookimpl


@hookimpl
def qplug_exporters() -> Iterable[type[Exporter[Any]]]:
    from qplug_vllm.exporter import VLLMExporter

    return [VLLMExporter]
