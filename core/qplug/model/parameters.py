"""Parameters of modules: set and emptied by name, checked, and passed to a call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from qplug.checkpoint.names import split_name
from qplug.errors import QplugError


def refuse_infinite(tensors: Mapping[str, Tensor]) -> None:
    """Raises QplugError for the first of ``tensors`` that is not finite."""
    extremes = torch.stack(
        [torch.stack(torch.aminmax(value)).float() for value in tensors.values()]
    )
    for name, finite in zip(tensors, torch.isfinite(extremes).all(1).tolist(), strict=True):
        if not finite:
            raise QplugError(f"{name}: has NaN or infinite values")


def fill_parameters(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Set the parameters and buffers of ``module`` named in ``values``."""
    for name, value in values.items():
        set_parameter(module, name, value)


def empty_parameters(module: nn.Module, names: Iterable[str]) -> None:
    """Free the memory of the parameters ``names`` of ``module``: empty ones take their place."""
    for name in names:
        set_parameter(module, name, torch.empty(0, device="meta"))


def set_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    """Set the parameter or buffer ``name`` of ``module``, of any shape; parameters are frozen."""
    path, local = split_name(name)
    owner = module.get_submodule(path)
    if local in owner._buffers:
        owner._buffers[local] = value
    else:
        owner._parameters[local] = nn.Parameter(value, requires_grad=False)


def call_block(
    module: nn.Module, parameters: Mapping[str, Tensor], inputs: Tensor, call: Mapping[str, Any]
) -> Tensor:
    """The hidden states that the block ``module`` returns for ``inputs`` with ``parameters``.

    ``inputs`` and the result: ``[samples, tokens, width]``; ``call``: its keyword arguments.
    """
    return first_tensor(functional_call(module, dict(parameters), (inputs,), dict(call)))


def first_tensor(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The hidden states in the output of a block, which may be a tuple that starts with them."""
    return output if isinstance(output, Tensor) else output[0]
