"""The plugin of the compressed-tensors format, which SGLang, vLLM and transformers load."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from qplug import Exporter, hookimpl


@hookimpl
def qplug_exporters() -> Iterable[type[Exporter[Any]]]:
    from qplug_compressed_tensors.exporter import CompressedTensorsExporter

    return [CompressedTensorsExporter]
