"""GGUF files for llama.cpp."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from qplug import Exporter, hookimpl


@hookimpl
def qplug_exporters() -> Iterable[type[Exporter[Any]]]:
    from qplug_gguf.exporter import GGUF

    return [GGUF]
