"""The plugin of the fake backend, which writes dequantized weights as a float checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from qplug import Exporter, hookimpl


@hookimpl
def qplug_exporters() -> Iterable[type[Exporter[Any]]]:
    from qplug_fake.exporter import Fake

    return [Fake]
