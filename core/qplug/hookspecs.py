"""The hooks that plugins implement, under the path that the documentation names."""

from __future__ import annotations

from qplug.api.hookspecs import (
    hookimpl,
    qplug_algorithms,
    qplug_block_done,
    qplug_commands,
    qplug_datasets,
    qplug_exporters,
    qplug_model_view,
    qplug_readers,
    qplug_run_begun,
    qplug_run_done,
    qplug_stage_begun,
    qplug_suggestions,
)

__all__ = [
    "hookimpl",
    "qplug_algorithms",
    "qplug_block_done",
    "qplug_commands",
    "qplug_datasets",
    "qplug_exporters",
    "qplug_model_view",
    "qplug_readers",
    "qplug_run_begun",
    "qplug_run_done",
    "qplug_stage_begun",
    "qplug_suggestions",
]


def __dir__() -> list[str]:
    return __all__
