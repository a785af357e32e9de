"""The plugin of the gpt-oss backend, which writes the MXFP4 layout that gpt-oss is published in."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from qplug import Exporter, hookimpl


@hookimpl
def qplug_exporters() -> Iterable[type[Exporter[Any]]]:
    from qplug_gpt_oss.exporter import GptOssExporter

    return [GptOssExporter]
