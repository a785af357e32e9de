"""Teach qplug an architecture that transformers does not know: GPT-style blocks of another name.

    qplug --plugin teach_architecture.py quantize ./my-model --out ./out

Algorithms that need no data can quantize it then, and ``qplug verify`` can check it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qplug import ModelView, hookimpl


@hookimpl
def qplug_model_view(config: Mapping[str, Any]) -> ModelView | None:
    if config.get("model_type") != "stacked-mixer":
        return None
    width, inner = config["width"], config["inner"]
    blocks = tuple(f"stack.{number}" for number in range(config["depth"]))
    shapes = {"mix": (width, width), "widen": (inner, width), "narrow": (width, inner)}
    linears = {f"{block}.{name}": shape for block in blocks for name, shape in shapes.items()}
    # What chooses among experts stays float: it is small, and wrong choices cost much.
    chooser = {f"{block}.chooser": (config["choices"], width) for block in blocks}
    return ModelView(
        config={},
        dtype=config["dtype"],
        linears={**linears, **chooser},
        quantizable=frozenset(linears),
        blocks=blocks,
        head=None,
    )
