"""Blocks whose parameters have the values of a checkpoint, by their names on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn


def fill_blocks(blocks: Mapping[str, nn.Module], stored: Callable[[str], Tensor]) -> int:
    """Gives each parameter the float32 values of its tensor; returns how many have three axes.

    ``blocks``: by name, as ``as_on_disk`` returns them. ``stored``: reads a tensor by its name. The
    shapes must be the same.
    """
    stacked = 0
    for block, module in blocks.items():
        for local, parameter in module.named_parameters():
            value = stored(f"{block}.{local}").float()
            assert parameter.shape == value.shape
            owner, _, last = local.rpartition(".")
            module.get_submodule(owner)._parameters[last] = nn.Parameter(value)
            stacked += value.ndim == 3
    return stacked
