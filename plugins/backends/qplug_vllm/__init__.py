"""The vllm backend: compressed-tensors folders within what vLLM's loader and kernels take."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from qplug import Exporter, hookimpl


@hookimpl
def qplug_exporters() -> Iterable[type[Exporter[Any]]]:
    from qplug_vllm.exporter import VLLMExporter

    return [VLLMExporter]
