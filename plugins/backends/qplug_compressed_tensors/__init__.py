"""The compressed-tensors format, as SGLang, vLLM and transformers load it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from qplug import Exporter, hookimpl


@hookimpl
def qplug_exporters() -> Iterable[type[Exporter[Any]]]:
    from qplug_compressed_tensors.exporter import CompressedTensorsExporter

    return [CompressedTensorsExporter]
