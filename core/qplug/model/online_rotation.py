"""Rotation of inputs while a model runs; qplug does it, engines do not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from qplug.errors import QplugError
from qplug.numerics.hadamard import hadamard_transform

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle


def rotate_inputs(
    modules: Mapping[str, nn.Module], linears: Iterable[str]
) -> list[RemovableHandle]:
    """Register hooks that multiply the inputs of ``linears`` by the Hadamard matrix of their width.

    ``modules``: by the names that ``linears`` has. Raises QplugError if one of ``linears`` is no
    ``nn.Linear`` in memory, such as a fused expert.
    """
    linears = tuple(linears)
    for name in linears:
        if not isinstance(modules.get(name), nn.Linear):
            raise QplugError(f"{name}: its inputs cannot be rotated as the model runs: it is fused")
    return [modules[name].register_forward_pre_hook(_rotate_input) for name in linears]


def _rotate_input(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (hadamard_transform(inputs[0]),)
