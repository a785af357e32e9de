"""The decoder blocks of a model, by their names in memory."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from qplug.errors import QplugError


def decoder_blocks(tree: nn.Module, folder: Path) -> tuple[str, ...]:
    """The names of the decoder blocks in ``tree``: those of its text decoder.

    Vision and audio towers have blocks too, which engines load float. Raises QplugError if there is
    no module list.
    """
    decoder = _text_decoder(tree)
    lists = [
        (name, module)
        for name, module in tree.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 0
    ]
    inside = [item for item in lists if f"{item[0]}.".startswith(decoder)]
    if not lists:
        raise QplugError(f"{folder}: no list of decoder blocks in this architecture")
    # The outermost list with the most parameters: lists of experts lie inside it.
    name, module = max(
        inside or lists, key=lambda item: sum(p.numel() for p in item[1].parameters())
    )
    return tuple(f"{name}.{index}" for index in range(len(module)))


def _text_decoder(tree: nn.Module) -> str:
    """The name of the text decoder with a dot; empty if it is the whole ``tree``, or not known."""
    find = getattr(tree, "get_decoder", None)
    decoder = find() if find is not None else None
    name = next((name for name, module in tree.named_modules() if module is decoder), "")
    return f"{name}." if name else ""
