"""The decoder blocks of a model, by their names in memory."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from qplug.errors import QplugError


def decoder_blocks(tree: nn.Module, folder: Path) -> tuple[str, ...]:
    """The names of the decoder blocks in ``tree``. Raises QplugError if there is no module list."""
    lists = [
        (name, module)
        for name, module in tree.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 0
    ]
    if not lists:
        raise QplugError(f"{folder}: no list of decoder blocks in this architecture")
    # The outermost list with the most parameters: lists of experts lie inside it.
    name, module = max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    return tuple(f"{name}.{index}" for index in range(len(module)))
