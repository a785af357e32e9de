"""Rotations that are done as a model runs: qplug can, engines cannot."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import Tensor, nn

from qplug.errors import QplugError
from qplug.numerics.hadamard import hadamard_transform

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle


def rotate_inputs(model: nn.Module, linears: Iterable[str]) -> list[RemovableHandle]:
    """From now on, the inputs of ``linears`` are multiplied by the Hadamard matrix of their width.

    Raises QplugError if one of them is no linear of its own in memory, as experts are not.
    """
    modules = dict(model.named_modules())
    linears = tuple(linears)
    for name in linears:
        if not isinstance(modules.get(name), nn.Linear):
            raise QplugError(f"{name}: its inputs cannot be rotated as the model runs: it is fused")
    return [modules[name].register_forward_pre_hook(_rotate_input) for name in linears]


def _rotate_input(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (hadamard_transform(inputs[0]),)
